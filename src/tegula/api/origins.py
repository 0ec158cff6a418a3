"""Which page in a browser a request comes from, if it comes from one."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from tegula.predictions.settings import ServerSettings


def from_own_page(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a page of this server sent a request that changes something."""
    origin = headers.get("origin")
    return origin is not None and _own(origin, headers, settings)


def from_stranger(headers: Headers, settings: ServerSettings) -> bool:
    """Whether a request may come from a page of somebody else.

    Where no token is asked for, any page that is open in a browser on this machine could
    send requests here, or read answers after having its own name point here.
    """
    origin = headers.get("origin")
    if origin is not None and not _own(origin, headers, settings):
        return not {"*", origin} & set(settings.cors_origins)
    if origin is None and headers.get("sec-fetch-site") == "cross-site":
        return headers.get("sec-fetch-mode") != "navigate"
    return not _known_host(headers.get("host", ""), settings)


def _own(origin: str, headers: Headers, settings: ServerSettings) -> bool:
    host = urlsplit(origin).netloc
    return host == headers.get("host") or host in _hosts(settings)


def _known_host(host: str, settings: ServerSettings) -> bool:
    """Whether a name is ours; an address always is, because no other name leads to it."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        known = {urlsplit(f"//{one}").hostname for one in _hosts(settings)}
        return name in known | {"localhost"}
    return True


def _hosts(settings: ServerSettings) -> set[str]:
    return {urlsplit(url).netloc for url in (settings.public_url, *settings.url_aliases)}
