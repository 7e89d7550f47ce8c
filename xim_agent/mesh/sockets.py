"""What httpx has no word for: options of its sockets, how much is read at once, and closing connections that wait.

All of it is private to httpx or httpcore, which are pinned.
"""

import socket
from typing import Any

import httpcore
import httpx
import trio

# A peer that is not there any more shows itself by what it does not acknowledge for 4 s: by then TCP has sent it four
# times, and an outage that is over earlier is over within 1.6 s for TCP too. On a connection that waits, such as a held
# poll, the kernel asks every 2 s, by one packet without data. Without these it would take a quarter of an hour.
SOCKET_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4000),
)
# In reads of 64 KiB, httpcore's own size, a gigabyte costs 2.5 s of CPU on its way through h11, httpcore and httpx; of
# 512 KiB 1.5 s. A read returns what has come, so that nothing waits for more.
READ = 512 * 1024
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = READ


class _Backend(httpcore.TrioBackend):
    """Sets SOCKET_OPTIONS; httpcore's own way to pass some leaves out connections to a system's proxy."""

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        return await super().connect_tcp(*args, **kwargs | {"socket_options": SOCKET_OPTIONS})


def prepare(http: httpx.AsyncClient) -> None:
    """Before the first call."""
    for pool in _pools(http):
        pool._network_backend = _Backend()


async def close_idle(http: httpx.AsyncClient) -> None:
    """Whatever ended one connection may have ended the others, without their telling. Within a second, also when
    cancelled.
    """
    with trio.move_on_after(1, shield=True):
        for pool in _pools(http):
            for connection in pool.connections:
                if connection.is_idle():
                    await connection.aclose()


def _pools(http: httpx.AsyncClient) -> list[httpcore.AsyncConnectionPool]:
    every = (http._transport, *http._mounts.values())
    return [transport._pool for transport in every if isinstance(transport, httpx.AsyncHTTPTransport)]
