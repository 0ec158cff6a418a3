"""The docs say what the code says."""

import re
from pathlib import Path

import pytest

from docs.generate import FOLDER, PAGES

ROOT = FOLDER.parent
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(FOLDER.rglob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_makes_now(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_shows_the_two_commands():
    text = Path(ROOT / "README.md").read_text()
    assert "make upscale" in text
    assert "make test" in text
