"""Names for new rows: ordered by time for rows that are listed, random for secrets."""

from __future__ import annotations

import secrets
from datetime import datetime

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter that looks like a digit."""

_RANDOM_BITS = 80
_LENGTH = 26


def new_id(now: datetime) -> str:
    """Return 26 characters: 48 bits of milliseconds, then 80 random ones, as in a ULID."""
    number = int(now.timestamp() * 1000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    return "".join(ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))


def new_secret() -> str:
    """Return 40 characters that nobody guesses: 200 random bits."""
    return "".join(secrets.choice(ALPHABET) for _ in range(40))
