"""Installs the clients that the conformance tests drive.

    python tests/clients/install.py FOLDER
    TEGULA_CLIENTS=FOLDER pytest tests/test_clients.py

Needs node with npm; each Python client gets a virtual environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

NPM = ("replicate@1.4.0", "replicate-stainless@0.9.0", "replicate-mcp@0.9.0")
PYTHON = ("1.0.7", "2.0.0b4")


def main() -> None:
    """Install everything below the folder that is given."""
    folder = Path(sys.argv[1]).resolve()
    (folder / "npm").mkdir(parents=True, exist_ok=True)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder / "npm")]
    subprocess.run([*install, *NPM], check=True)
    for version in PYTHON:
        home = folder / f"py-{version}"
        venv.create(home, with_pip=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"replicate=={version}"], check=True)


if __name__ == "__main__":
    main()
