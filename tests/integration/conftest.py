"""Fixtures of the tests that run nets, a database or the HTTP API in this process."""

import pytest
from api_support import server
from sd15_support import files, folder, offline
from store_support import (
    bucket,
    clock,
    database_url,
    empty_database_url,
    moto,
    postgresql,
    run,
    sign_in,
    store,
)

__all__ = [
    "bucket",
    "clock",
    "database_url",
    "empty_database_url",
    "files",
    "folder",
    "moto",
    "offline",
    "postgresql",
    "run",
    "server",
    "sign_in",
    "store",
]


@pytest.fixture
def opened(tmp_path):
    """Return what opens a state as a LoRA, after writing it."""
    from lora_support import opener  # builds networks, which few tests need

    return opener(tmp_path)


@pytest.fixture(scope="session")
def photograph(tmp_path_factory):
    """Return the path of a photograph of 512 px, to train on."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    path = tmp_path_factory.mktemp("photographs") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path
