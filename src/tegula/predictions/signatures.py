"""The signature of a webhook, as standard-webhooks (standardwebhooks.com) defines it."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence


def sign(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """Return ``v1,`` and the base64 of an HMAC-SHA256 over id, time and body.

    Args:
        secret: ``whsec_`` and base64.
        message_id: id of the message, the same over all attempts.
        timestamp: seconds since 1970 of this attempt.
        body: the text that is sent.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    digest = hmac.digest(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256)
    return "v1," + base64.b64encode(digest).decode()


def signed_headers(
    secrets: Sequence[str], message_id: str, timestamp: int, body: str
) -> Mapping[str, str]:
    """Return the headers of a message, with one signature for each valid secret."""
    signatures = " ".join(sign(secret, message_id, timestamp, body) for secret in secrets)
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signatures,
    }
