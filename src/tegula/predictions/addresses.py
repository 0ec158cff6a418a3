"""Which addresses of the network may be talked to on behalf of strangers."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address

_NEVER = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",
        "169.254.0.0/16",  # link-local: the metadata services of clouds
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/96",  # unspecified, loopback and IPv4-compatible; loopback is told apart below
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
        "fd00:ec2::254/128",  # a metadata service
    )
)
_PRIVATE_ONLY = tuple(
    ip_network(network)
    for network in ("100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15")
)


def may_reach(address: str, *, private: bool) -> bool:
    """Whether an address may be connected to.

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
    if any(parsed in network for network in _NEVER if network.version == parsed.version):
        return False
    return private or _is_public(parsed)


def _is_public(address: Address) -> bool:
    special = any(
        address in network for network in _PRIVATE_ONLY if network.version == address.version
    )
    return address.is_global and not special
