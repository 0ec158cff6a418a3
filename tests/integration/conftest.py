"""Fixtures of the tests that run nets, a database or the HTTP API in this process."""

from api_support import server
from sd15_support import files, folder, offline

__all__ = ["files", "folder", "offline", "server"]
