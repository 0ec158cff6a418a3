"""Remakes the lock files, and says which of them is for this Python.

    python requirements/lock.py              # what `make lock` runs
    python requirements/lock.py --file       # the lock file of this Python, or nothing
    python requirements/lock.py --versions   # its versions without the hashes, as constraints

One file for each Python, `dev-3.11.txt` and so on, holds the exact versions of everything that
`tegula[dev]` needs, on every system, with the hashes of their files. pip checks the hashes where
it installs, so nothing else can be slipped in by whoever serves the files.

Torch is left out, and what only its CUDA builds bring: which build is right (CPU, CUDA, ROCm) is
a matter of the machine and not of this project. pip picks it within the bounds of
pyproject.toml, after the locked rest is there. No file says where to install from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LEFT_TO_THE_MACHINE = re.compile(r"(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)$")
HEAD = """\
# Made by `make lock` from pyproject.toml; not to be edited. Install with
#     pip install --no-deps --require-hashes --requirement requirements/dev-{python}.txt
#     pip install --editable '.[dev]'
"""
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"},
]


def resolve(python: str, source: str, *options: str) -> str:
    """Return what uv pins, for every system, from the newest release of this Python on."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", python]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-config"]
    done = subprocess.run(
        [*command, *options, source],
        cwd=FOLDER.parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def wanted(requirement: str, python: str) -> bool:
    """Whether a pinned requirement is for this Python, and not left to the machine."""
    from packaging.markers import Marker, default_environment

    words, _, marker = requirement.partition("\\\n")[0].strip().partition(";")
    if LEFT_TO_THE_MACHINE.match(words.partition("==")[0].strip()):
        return False
    if not marker:
        return True
    version = {"python_version": python, "python_full_version": f"{python}.99"}
    for system in SYSTEMS:
        for machine in ("x86_64", "aarch64", "arm64", "AMD64"):
            here: dict[str, str] = {**default_environment(), **system, **version}  # type: ignore[dict-item]
            here["platform_machine"] = machine
            if Marker(marker.strip()).evaluate(here):
                return True
    return False


def lock(python: str) -> str:
    """Return the lock file of one Python."""
    pinned = resolve(python, "pyproject.toml", "--extra", "dev")
    alone = resolve(python, "requirements/alone.in", "--no-deps")
    entries = re.findall(r"^[a-z0-9].*(?:\n .*)*", pinned + alone, re.MULTILINE)
    kept = sorted(entry for entry in entries if wanted(entry, python))
    text = "\n".join([HEAD.format(python=python) + kept[0], *kept[1:], ""])
    if "://" in text or "index-url" in text:
        raise SystemExit("A lock file must not say where to install from.")
    return text


def lock_file() -> Path | None:
    """Return the lock file of the Python that runs this, if it has one."""
    path = FOLDER / f"dev-{sys.version_info[0]}.{sys.version_info[1]}.txt"
    return path if path.exists() else None


def versions(path: Path) -> str:
    """Return the pinned versions of a lock file, without their hashes."""
    pinned = re.findall(r"^[a-z0-9].*?(?= \\$)", path.read_text(), re.MULTILINE)
    return "\n".join([*pinned, ""])


def main(words: list[str]) -> None:
    """Do what the docstring above says of the only word."""
    path = lock_file()
    if words == ["--file"]:
        print(path or "")
    elif words == ["--versions"]:
        print(versions(path) if path else "", end="")
    else:
        for python in PYTHONS:
            (FOLDER / f"dev-{python}.txt").write_text(lock(python), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
