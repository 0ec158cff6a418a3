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
