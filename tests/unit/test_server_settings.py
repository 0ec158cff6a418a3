"""What an operator sets: by file, by environment, and where they disagree."""

from __future__ import annotations

import json

import pytest

from tegula.errors import OptionError, PathError
from tegula.server.settings import ServerSettings, describe_settings, load_settings


def test_the_environment_goes_before_the_file_and_arguments_before_both(tmp_path, monkeypatch):
    file = tmp_path / "tegula.json"
    file.write_text(json.dumps({"retention_seconds": 5, "bundle": "sd15", "max_waiting": 7}))
    monkeypatch.setenv("TEGULA_RETENTION_SECONDS", "0")
    monkeypatch.setenv("TEGULA_FETCH_PORTS", "80, 8080")
    monkeypatch.setenv("TEGULA_BUNDLE", "mini")
    settings = load_settings(file, bundle="other")
    assert (settings.retention_seconds, settings.bundle) == (0, "other")
    assert (settings.fetch_ports, settings.max_waiting) == ((80, 8080), 7)


@pytest.mark.parametrize(
    ("name", "text"),
    [("RETENTION_SECONDS", "soon"), ("NO_AUTH", "perhaps"), ("FETCH_PORTS", "80,x"),
     ("RETENTION_SECONDS", "-1"), ("PUBLIC_URL", "tiles.example.com"), ("RUN_SECONDS", "nan"),
     ("SAFETY_THRESHOLD", "2"), ("FETCHES_PER_HOST", "0"), ("WEBHOOKS_PER_RECEIVER", "0")],
)  # fmt: skip
def test_a_setting_of_the_wrong_form_is_refused_by_name(name, text, monkeypatch):
    monkeypatch.setenv(f"TEGULA_{name}", text)
    with pytest.raises(OptionError, match=name.lower()):
        load_settings()


@pytest.mark.parametrize("value", [10.9, "10.9", True])
def test_a_whole_number_is_never_made_of_something_else(tmp_path, value):
    file = tmp_path / "tegula.json"
    file.write_text(json.dumps({"retention_seconds": value}))
    with pytest.raises(OptionError, match="retention_seconds is a whole number from 0, not"):
        load_settings(file)


def test_all_faults_are_listed_at_once(tmp_path, monkeypatch):
    file = tmp_path / "tegula.json"
    file.write_text(json.dumps({"retention": 5, "compile": "perhaps", "max_waiting": -1}))
    monkeypatch.setenv("TEGULA_FETCH_PORTS", "80,x")
    with pytest.raises(OptionError) as refused:
        load_settings(file)
    assert set(str(refused.value).removesuffix(".").split("; ")) == {
        "there is no setting retention (did you mean retention_seconds?)",
        "compile is true or false, not 'perhaps'",
        "max_waiting is at least 0, not -1",
        "fetch_ports is a list of whole numbers, not 'x'",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "TEGULA_BUNDLES is not JSON; give one object."),
        ("5", "bundles is an object, not 5."),
        ("[]", "bundles is an object, not []."),
        ('{"ana/x": 5}', "bundles, ana/x: options are an object, not 5."),
        ('{"ana/x": {"bundle": 3}}', "bundles, ana/x: bundle is text, not 3."),
        (
            '{"ana/x": {"lora": []}}',
            "bundles, ana/x: there is no option lora (did you mean loras?).",
        ),
    ],
)
def test_bundles_that_are_none_are_refused_in_one_sentence(text, sentence, monkeypatch):
    monkeypatch.setenv("TEGULA_BUNDLES", text)
    with pytest.raises(OptionError) as refused:
        load_settings()
    assert str(refused.value) == sentence


@pytest.mark.parametrize("text", ["", "[]", '{"retention": 5}'])
def test_a_file_that_is_no_settings_is_refused(tmp_path, text):
    file = tmp_path / "tegula.json"
    file.write_text(text)
    with pytest.raises((OptionError, PathError)):
        load_settings(file)


def test_an_empty_list_allows_any_port_and_the_public_url_has_no_slash(monkeypatch):
    monkeypatch.setenv("TEGULA_FETCH_PORTS", "")
    assert load_settings().fetch_ports == ()
    assert ServerSettings(public_url="https://a.example/").public_url == "https://a.example"


def test_every_setting_is_described_in_one_sentence():
    for setting in describe_settings():
        assert setting.effect.endswith("."), setting.name
