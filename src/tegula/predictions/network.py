"""Connections that go to checked addresses only, and last no longer than they may."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import httpcore

from tegula.errors import FetchError
from tegula.predictions.addresses import may_reach

_READ_AT_MOST = 16_384

Resolve = Callable[[str, int], Sequence[str]]
"""Every address of a host."""


def system_resolve(host: str, port: int) -> Sequence[str]:
    """Ask the system for the addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(answer[4][0]) for answer in found]


def left_until(end: float) -> float:
    """Return the seconds until a moment of the monotonic clock.

    Raises:
        httpcore.ReadTimeout: it has passed.
    """
    left = end - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


class CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only, and gives up when the time is over."""

    def __init__(self, private: bool, resolve: Resolve, end: float) -> None:  # noqa: FBT001
        self._private = private
        self._resolve = resolve
        self._end = end
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the end of the exchange counts
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers, once all of them are checked."""
        addresses = list(dict.fromkeys(self._resolve(host.strip("[]"), port)))
        if not addresses or not all(
            may_reach(address, private=self._private) for address in addresses
        ):
            raise FetchError("The URL names a host on the public internet.")
        for address in addresses[:-1]:
            try:
                return self._connect(address, port, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):  # noqa: PERF203
                continue
        return self._connect(addresses[-1], port, local_address, socket_options)

    def _connect(
        self, address: str, port: int, local: str | None, options: Iterable[Any] | None
    ) -> httpcore.NetworkStream:
        left = left_until(self._end)
        stream = self._backend.connect_tcp(address, port, min(left, 10.0), local, options)
        return _TimedStream(stream, self._end)


class _TimedStream(httpcore.NetworkStream):
    """A connection on which every wait ends with the exchange."""

    def __init__(self, stream: httpcore.NetworkStream, end: float) -> None:
        self._stream = stream
        self._end = end

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        """Read what is there."""
        return self._stream.read(min(max_bytes, _READ_AT_MOST), left_until(self._end))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        """Write everything."""
        self._stream.write(buffer, left_until(self._end))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        """Go on with TLS; the certificate is that of the name, not of the address."""
        left = left_until(self._end)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._end)

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection knows of itself."""
        return self._stream.get_extra_info(info)
