"""Fixtures of the tests that use the pages as a person does."""

from workbench import chromium, page, tab, workbench

__all__ = ["chromium", "page", "tab", "workbench"]
