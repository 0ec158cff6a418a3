"""Installs the clients that the conformance tests drive.

    python tests/end_to_end/clients/install.py FOLDER
    TEGULA_CLIENTS=FOLDER pytest tests/end_to_end/test_clients.py

Needs node with npm; each Python client gets a virtual environment of its own. Without
TEGULA_CLIENTS the tests install into the user's cache by themselves.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

NPM = {"replicate": "1.4.0", "replicate-stainless": "0.9.0", "replicate-mcp": "0.9.0"}
PYTHON = ("1.0.7", "2.0.0b4")
TIMEOUT_S = 300


def install(folder: Path) -> None:
    """Install every client below the folder.

    Raises:
        OSError, subprocess.SubprocessError: a registry does not answer, or the disk is full.
    """
    (folder / "npm").mkdir(parents=True, exist_ok=True)
    words = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1", "--prefix"]
    _run([*words, str(folder / "npm"), *(f"{name}@{version}" for name, version in NPM.items())])
    for version in PYTHON:
        home = folder / f"py-{version}"
        venv.create(home)
        words = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install"]
        _run([*words, "--quiet", "--retries=1", f"replicate=={version}"])


def is_installed(folder: Path) -> bool:
    """Whether every client is below the folder, with a Python that is still there."""
    modules = [folder / "npm" / "node_modules" / name / "package.json" for name in NPM]
    pythons = [folder / f"py-{version}" / "bin" / "python" for version in PYTHON]
    return all(path.exists() for path in (*modules, *pythons))


def install_in_cache() -> Path:
    """Return a folder of the user's cache with the clients in it, installing what is missing.

    Raises:
        OSError, subprocess.SubprocessError: as ``install`` does.
    """
    what = repr((NPM, PYTHON, sys.base_prefix, sys.version_info[:3]))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tegula"
    folder = caches / f"clients-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if is_installed(folder):
        return folder
    caches.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=caches) as fresh:
        made = Path(fresh) / "clients"
        install(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _run(words: list[str]) -> None:
    subprocess.run(words, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    install(Path(sys.argv[1]).resolve())
