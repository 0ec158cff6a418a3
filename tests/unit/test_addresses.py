"""Addresses of strangers: which of them may be reached at all."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tegula.errors import FetchError
from tegula.server.addresses import Policy, host_of, may_reach

INTERNAL = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.0",
    "10.255.255.255",
    "100.64.0.0",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.0.1",
    "169.254.169.254",
    "172.16.0.0",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.171",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.0",
    "192.168.255.255",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
OPEN = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.254",
    "2606:4700:4700::1111",
    "2a00:1450:4001:81b::200e",
]
NEVER = [
    "0.0.0.0",
    "169.254.169.254",
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "fe80::1",
    "::ffff:127.0.0.1",
]


@pytest.mark.parametrize("address", INTERNAL)
def test_internal_addresses_are_out_of_reach(address):
    assert not may_reach(address, private=False)


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses_are_in_reach(address):
    assert may_reach(address, private=False)


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_out_of_reach_even_where_private_ones_are_allowed(address):
    assert not may_reach(address, private=True)


@given(st.ip_addresses(v=6, network="64:ff9b::/96") | st.ip_addresses(v=6, network="2002::/16"))
def test_no_address_reaches_another_one_inside_it(address):
    assert not may_reach(str(address), private=True)


@given(st.ip_addresses(v=4))
def test_what_python_calls_internal_is_never_in_reach(address):
    if not ipaddress.ip_address(address).is_global:
        assert not may_reach(str(address), private=False)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a",
        "gopher://example.com/",
        "//example.com/a",
        "example.com/a",
        "",
        "http://",
        "http:///a",
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://@example.com/",
        "https://example.com:22/",
        "https://example.com:99999/",
        "https://example.com:x/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:7f00:1]/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[fe80::1%25eth0]/",
        "https://[broken/",
        "https://example.com/ with a space",
        "https://example.com/\nHost: other",
        "https://example.com/" + "a" * 5000,
    ],
)
def test_such_urls_are_refused_before_anything_is_sent(url):
    with pytest.raises(FetchError):
        Policy().check(url)


def test_plain_http_is_refused_where_the_operator_says_so():
    with pytest.raises(FetchError, match="https"):
        Policy(http=False).check("http://example.com/")


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://Cat.example:8/a", "cat.example"), ("http://[::1]/", "::1"), ("http://[", "")],
)
def test_the_host_of_an_address(url, host):
    assert host_of(url) == host
    assert len(host_of(f"https://{'a' * 300}/")) == 255
