"""The lock files hold all that the project needs, and nothing of where it comes from."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("dev-*.txt"))
LEFT_TO_THE_MACHINE = {"torch"}


def needed(python):
    """Everything that `tegula[dev]` names, its own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, seen = [*project["dependencies"], "tegula[dev]"], set()
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        if requirement.name != "tegula":
            yield requirement
        for extra in requirement.extras - seen if requirement.name == "tegula" else ():
            seen.add(extra)
            waiting += project["optional-dependencies"][extra]


def test_every_python_of_the_classifiers_has_a_lock_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)'", str(project["classifiers"]))
    assert [path.stem for path in LOCKS] == [f"dev-{python}" for python in named]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_fits_what_the_project_asks_for(lock):
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", lock.read_text(), re.MULTILINE))
    for requirement in needed(lock.stem.removeprefix("dev-")):
        if requirement.name not in LEFT_TO_THE_MACHINE:
            version = pinned.get(requirement.name, "0")
            assert version in requirement.specifier, f"run `make lock`: {requirement}"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_file_has_a_hash_for_everything_and_says_nothing_of_where_it_comes_from(lock):
    text = lock.read_text()
    for entry in re.findall(r"^[a-z0-9].*(?:\n .*)*", text, re.MULTILINE):
        assert "--hash=sha256:" in entry
    assert "://" not in text
    assert not re.search(r"^ *-(?!-hash)", text, re.MULTILINE)
