"""Fixtures of the tests that run nets, a database or the HTTP API in this process."""

from api_support import server
from sd15_support import files, folder, offline
from store_support import postgresql

__all__ = ["files", "folder", "offline", "postgresql", "server"]
