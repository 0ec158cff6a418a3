"""Capabilities: names that prove by a signature that this server gave them out."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Signer:
    """Signs names for one purpose each, so that a link to one thing opens no other."""

    key: bytes = field(repr=False)

    def token(self, purpose: str, name: str) -> str:
        """Return ``name.signature``, fit for the path of a URL."""
        return f"{name}.{self._signature(purpose, name)}"

    def name_of(self, purpose: str, token: str) -> str | None:
        """Return the name in a token, or None if we never signed it for this purpose."""
        name, _, signature = token.rpartition(".")
        expected = self._signature(purpose, name)
        same = hmac.compare_digest(signature.encode(), expected.encode())
        return name if same else None

    def download(self, owner: str, file_id: str, expiry: int) -> str:
        """Return the signature of a file's download in the API's form: base64 of an HMAC."""
        text = f"{owner} {file_id} {expiry}"
        return base64.b64encode(self._digest("download", text)).decode()

    def _signature(self, purpose: str, name: str) -> str:
        return base64.urlsafe_b64encode(self._digest(purpose, name)[:24]).decode()

    def _digest(self, purpose: str, name: str) -> bytes:
        key = hmac.digest(self.key, purpose.encode(), hashlib.sha256)
        return hmac.digest(key, name.encode(), hashlib.sha256)
