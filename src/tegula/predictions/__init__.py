"""Predictions as rows: states, store, files, webhooks, retention and limits; no torch, no HTTP."""
