"""Files written out in a URL: ``data:[type][;base64],...``."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

from tegula.errors import InputError


def is_data_uri(value: str) -> bool:
    """Whether a text is a data URI."""
    return value[:5].lower() == "data:"


def decode_data_uri(uri: str) -> tuple[bytes, str]:
    """Return the bytes and the type that a data URI holds.

    Raises:
        InputError: it has no comma, or its base64 is broken.
    """
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise InputError("A data URI has a comma before its data.")
    kind, *parameters = (part.strip() for part in head.split(";"))
    kind = kind.lower() or "text/plain"
    if "base64" not in (parameter.lower() for parameter in parameters):
        return unquote_to_bytes(body), kind
    try:
        return base64.b64decode(_padded(body), validate=True), kind
    except (binascii.Error, ValueError) as error:
        raise InputError("The base64 of a data URI is broken.") from error


def encode_data_uri(data: bytes, kind: str) -> str:
    """Return bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _padded(body: str) -> str:
    """Take what clients send: percent-escapes, line breaks, the url-safe alphabet, no padding."""
    if "%" in body:
        body = unquote_to_bytes(body).decode("latin-1")
    plain = "".join(body.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return plain + "=" * (-len(plain) % 4)
