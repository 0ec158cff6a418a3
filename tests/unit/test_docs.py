"""The docs say what the code says."""

import re
from pathlib import Path

import pytest

from docs.generate import FOLDER, LIMITS, PAGES, with_diagram, with_limits, with_settings
from tegula.server.lifecycle import TRANSITIONS
from tegula.server.settings import ServerSettings

ROOT = FOLDER.parent
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(FOLDER.rglob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_what_the_code_makes_now(name):
    assert (FOLDER / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_state_diagram_is_the_table_of_transitions():
    page = (FOLDER / "server.md").read_text()
    assert with_diagram(page) == page, "run `make docs`"
    drawn = set(re.findall(r"^ {4}(\w+) --> (\w+):", page, re.MULTILINE))
    assert drawn == {(state.value, then.value) for (state, _), then in TRANSITIONS.items()}


def test_the_table_of_settings_is_what_the_server_reads():
    page = (FOLDER / "server.md").read_text()
    assert with_settings(page) == page, "run `make docs`"
    table = page.partition("## Settings")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(ServerSettings.model_fields)


def test_the_table_of_limits_has_every_setting_that_is_a_number():
    page = (FOLDER / "server.md").read_text()
    assert with_limits(page) == page, "run `make docs`"
    numbers = {
        name
        for name, known in ServerSettings.model_fields.items()
        if known.annotation in (int, float)
        and name not in ("safety_threshold", "ray_cpus", "ray_gpus", "ray_shard_above")
    }
    assert len(numbers) > 25
    table = page.partition("| limit | default |")[2].partition("\n\n")[0]
    shown = re.findall(r"^\| [^|]+ \| [^|]+ \| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(shown) == sorted(numbers)
    # A text stands in the place of a default only where that is 0, which is not the limit itself.
    for limit in LIMITS:
        default = ServerSettings.model_fields[limit.setting].default if limit.setting else 0
        assert bool(default) != bool(limit.shown) or limit.setting == "ray_min_actors", limit.what


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_a_page_says_a_thing_in_one_place(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,3} .*", text, re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.name)
def test_the_modules_that_pages_name_are_there(page):
    for name in re.findall(r"`([\w./]+\.py)`", page.read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "tegula")), name


def test_the_readme_shows_the_two_commands():
    text = Path(ROOT / "README.md").read_text()
    assert "make upscale" in text
    assert "make test" in text


def test_the_example_with_an_embedding_has_its_word_in_a_prompt():
    page = (FOLDER / "stable-diffusion.md").read_text()
    commands = re.findall(r"tegula upscale (?:.*\\\n)*.*", page)
    words = [
        (re.findall(r"--embedding +\S*?([\w-]+)\.\w+", command), command) for command in commands
    ]
    assert any(named for named, _ in words)
    for named, command in words:
        for word in named:
            assert re.search(rf"prompt .*\b{word}\b", command), command
