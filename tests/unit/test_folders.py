"""Where files are kept: the defaults on Linux, and the variables that move them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tegula import folders
from tegula.errors import PathError

VARIABLES = ("TEGULA_CACHE", "TEGULA_MODELS", "TEGULA_FOLDER", "XDG_CACHE_HOME", "XDG_DATA_HOME")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="these are the folders of Linux")
def test_the_folders_are_those_of_the_xdg_specification(monkeypatch, home):
    assert folders.cache_folder() == home / ".cache/tegula"
    assert folders.models_folder() == home / ".local/share/tegula/models"
    assert folders.server_folder() == home / ".local/share/tegula"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert folders.cache_folder() == Path("/caches/tegula")
    assert folders.models_folder() == Path("/data/tegula/models")
    assert folders.server_folder() == Path("/data/tegula")


def test_each_folder_is_moved_by_its_variable(monkeypatch, home):
    for name in VARIABLES[:3]:
        monkeypatch.setenv(name, f"~/{name}")
    assert folders.cache_folder() == home / "TEGULA_CACHE"
    assert folders.models_folder() == home / "TEGULA_MODELS"
    assert folders.server_folder() == home / "TEGULA_FOLDER"


@pytest.mark.parametrize("variable", [None, "", "~/elsewhere"])
def test_the_server_takes_its_folder_from_the_same_place(monkeypatch, variable):
    settings = pytest.importorskip("tegula.server.settings")
    if variable is not None:
        monkeypatch.setenv("TEGULA_FOLDER", variable)
    assert settings.ServerSettings().folder == folders.server_folder()
    assert settings.load_settings().folder == folders.server_folder()


@pytest.mark.skipif(sys.platform != "linux", reason="others always have a home")
def test_a_user_without_a_home_has_private_temporary_folders(monkeypatch, tmp_path):
    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache, models = folders.cache_folder(), folders.models_folder()
    assert cache.parent == models.parent.parent
    assert cache.parent.parent == tmp_path
    assert cache.parent.stat().st_mode & 0o077 == 0
    cache.parent.chmod(0o777)
    with pytest.raises(PathError, match="set HOME"):
        folders.cache_folder()
