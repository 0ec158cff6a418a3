"""Fixtures of the tests that use the pages as a person does."""

from workbench import chromium, page, workbench

__all__ = ["chromium", "page", "workbench"]
