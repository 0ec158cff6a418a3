"""The options of `tegula serve`, and the addresses it refuses."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_support import run

from tegula.cli import serve
from tegula.cli.serve import SERVE, Address, check_address, read_settings
from tegula.errors import OptionError
from tegula.server.settings import ServerSettings, describe_settings


def test_the_help_describes_every_setting_in_its_own_words():
    shown = "".join(run("serve", "--help").stdout.split())
    options = {parameter.name for parameter in SERVE.params}
    for setting in describe_settings():
        assert "".join(setting.effect.split()) in shown
        assert setting.name in options or f"TEGULA_{setting.name.upper()}" in shown


def test_options_win_over_the_file_of_settings(tmp_path):
    config = tmp_path / "tegula.json"
    config.write_text(json.dumps({"bundle": "theirs", "no_auth": True, "devices": ["cpu"]}))
    words = ["--model", "mine", "--config", str(config)]
    given = SERVE.make_context("serve", words).params
    settings = read_settings(
        given["config"], {name: given[name] for name in ("bundle", "no_auth", "devices")}
    )
    assert (settings.bundle, settings.no_auth, settings.devices) == ("mine", True, ("cpu",))


@pytest.mark.parametrize(
    ("settings", "address", "says"),
    [
        ({"no_auth": True}, Address("192.0.2.1", 80), "everybody who reaches 192.0.2.1"),
        ({}, Address("127.0.0.1", 80, cert=Path("cert.pem")), "go together"),
        ({}, Address("0.0.0.0", 80), "--public-url"),
        ({}, Address("::", 80), "--public-url"),
    ],
)
def test_an_address_that_would_not_do_is_refused(settings, address, says):
    with pytest.raises(OptionError, match=says):
        check_address(ServerSettings(**settings), address, force=False)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (Address("127.0.0.1", 8000), "http://127.0.0.1:8000"),
        (Address("::1", 80, Path("c"), Path("k")), "https://[::1]:80"),
        (Address("127.0.0.1", 443, Path("c"), Path("k")), "https://127.0.0.1"),
        (Address("127.0.0.1", 80), "http://127.0.0.1"),
        (Address("127.0.0.1", 443), "http://127.0.0.1:443"),
    ],
)
def test_the_url_of_an_address(address, url):
    assert address.url == url
    assert address.is_loopback
    assert not address.is_wildcard


def test_what_is_loaded_is_searched_for_garbage_no_more_once_the_server_listens(monkeypatch):
    from tegula.server.api.app import FastAPI, GracefulServer
    from tegula.server.api.counters import Metrics

    app, frozen = FastAPI(), []
    app.state.service = SimpleNamespace(settings=ServerSettings(), metrics=Metrics())

    def run(server):
        frozen.append(gc.get_freeze_count())
        server.started = True

    monkeypatch.setattr(GracefulServer, "run", run)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    before = gc.get_freeze_count()
    serve._listen(app, Address("127.0.0.1", 8000), 1.0, lambda: None)
    assert frozen[0] > before
