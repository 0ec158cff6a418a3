"""Which addresses that users name may be talked to.

Whoever may name a URL must not reach what only this server reaches: other programs on the
machine, its private network, a cloud's metadata service. ``Policy`` judges URLs as far as they
tell; ``fetch`` asks again about every address that it is going to connect to.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import SplitResult, urlsplit

from tegula.errors import FetchError
from tegula.server.settings import ServerSettings

IPRange = IPv4Network | IPv6Network

_NEVER = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "169.254.0.0/16",  # link-local: the metadata services of clouds
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "::/96",  # unspecified, IPv4-compatible, and loopback, which may_reach looks at first
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64 of a network's own
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local, of old
        "ff00::/8",  # multicast
        "fd00:ec2::254/128",  # the metadata service of a cloud
    )
)
"""IP ranges that nobody reaches; several carry an IPv4 address inside an IPv6 one."""

_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
    )
)
"""IP ranges that are private too, though some versions of Python call them global."""


def may_reach(address: str, *, private: bool) -> bool:
    """Whether an IP address may be connected to.

    Only unicast addresses of the public internet may. With ``private``, those of private
    networks and of this machine too; never link-local ones, and never IPv6 addresses that
    carry an IPv4 address inside, whatever that is.
    """
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if parsed == IPv6Address("::1"):
        return private
    if _within(parsed, _NEVER):
        return False
    return private or (parsed.is_global and not _within(parsed, _NOT_PUBLIC))


def _within(address: IPv4Address | IPv6Address, ranges: Iterable[IPRange]) -> bool:
    return any(address in known for known in ranges if known.version == address.version)


def out_of_reach(host: str, *, private: bool) -> FetchError:
    """Return why a host is refused; it is named as it was given, not by its addresses."""
    if private:
        return FetchError(f"{host} is a reserved address; the URL must name another host.")
    return FetchError(
        f"{host} is not on the public internet, and this server reaches no private networks "
        "(fetch_private is off)."
    )


Resolve = Callable[[str, int], Sequence[str]]
"""Returns every IP address of a host."""


def system_resolve(host: str, port: int) -> Sequence[str]:
    """Return the IP addresses that the system knows of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in found]


MOST_CHARACTERS = 4096
_PORTS = {"http": 80, "https": 443}
_LONGEST_HOST = 255


@dataclass(frozen=True)
class Policy:
    """Which URLs may be talked to.

    http: also those without TLS.
    private: also those in private networks and on this machine.
    ports: the only ports; all of them if empty.
    """

    http: bool = True
    private: bool = False
    ports: tuple[int, ...] = (80, 443)

    @classmethod
    def of(cls, settings: ServerSettings) -> Policy:
        """Return what the operator allows."""
        return cls(settings.fetch_http, settings.fetch_private, settings.fetch_ports)

    def check(self, url: str) -> SplitResult:
        """Return the parts of a URL, checked as far as is possible without resolving its host.

        Raises:
            FetchError: it may not be talked to.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise FetchError("The URL is malformed.") from error
        if len(url) > MOST_CHARACTERS or any(ord(character) < 33 for character in url):
            raise FetchError(
                f"The URL must have at most {MOST_CHARACTERS} characters and no spaces."
            )
        if parts.scheme not in (("http", "https") if self.http else ("https",)):
            raise FetchError(
                f"The URL must begin with https://{' or http://' if self.http else ''}."
            )
        if parts.username is not None or parts.password is not None:
            raise FetchError("The URL must not contain a user name or password.")
        if not parts.hostname:
            raise FetchError("The URL must name a host.")
        # Before the port: another port would not help.
        if not self._plausible(parts.hostname):
            raise out_of_reach(parts.hostname, private=self.private)
        if self.ports and port not in self.ports:
            raise FetchError(f"The URL must use port {' or '.join(map(str, self.ports))}.")
        return parts

    def check_resolved(self, url: str, resolve: Resolve) -> None:
        """Check a URL like ``check``, and also the addresses that its host has at present.

        A host that is unknown at present passes. What is sent is checked again at that time.

        Raises:
            FetchError: it may not be talked to.
        """
        parts = self.check(url)
        host = parts.hostname or ""
        try:
            addresses = resolve(host, parts.port or _PORTS[parts.scheme])
        except (OSError, UnicodeError):
            return
        if not all(may_reach(address, private=self.private) for address in addresses):
            raise out_of_reach(host, private=self.private)

    def _plausible(self, host: str) -> bool:
        try:
            ip_address(host)
        except ValueError:
            return True
        return may_reach(host, private=self.private)


def host_of(url: str) -> str:
    """Return the host that a URL names, in lower case; empty if it is malformed.

    It is cut to what the database takes, which is more than any host has that can be reached.
    """
    try:
        return (urlsplit(url).hostname or "")[:_LONGEST_HOST]
    except ValueError:
        return ""
