"""A browser's part of signing in to the dashboard, with httpx."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio
from fakes.agent import Bench

from xim_agent.router.dashboard import sessions
from xim_agent.router.dashboard.parts import Role


async def sign_in(http: httpx.AsyncClient, token: str) -> httpx.Response:
    """`http` has the cookie and the CSRF token afterwards, if the link was good."""
    reply = await http.post("/dashboard/api/login", json={"token": token})
    if reply.status_code == 204:
        http.headers["x-csrf-token"] = (await http.get("/dashboard/api/session")).json()["csrf"]
    return reply


@asynccontextmanager
async def signed_in(bench: Bench, role: Role = "admin") -> AsyncIterator[httpx.AsyncClient]:
    """A client of the dashboard at `bench`, whose link was made just now."""
    async with httpx.AsyncClient(base_url=bench.url, trust_env=False, verify=False, timeout=30) as http:
        http.headers["origin"] = bench.url
        reply = await sign_in(http, sessions.make_link(bench.store.db, time.time(), role))
        assert reply.status_code == 204, reply.text
        yield http


class Events:
    """The stream of snapshots, as text; a client of httpx cannot leave one half-read quietly."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.seen = b""

    async def until(self, text: str) -> None:
        """Fails after 10 s, or at the stream's end."""
        with trio.fail_after(10):
            while text.encode() not in self.seen:
                part = await self.stream.receive_some()
                assert part, f"the stream ended: {self.seen[-500:]!r}"
                self.seen += part

    async def end(self) -> None:
        """Until the router ends it; fails after 10 s."""
        with trio.fail_after(10):
            while b"\r\n0\r\n\r\n" not in self.seen:
                part = await self.stream.receive_some()
                if not part:
                    return
                self.seen += part


@asynccontextmanager
async def events(http: httpx.AsyncClient) -> AsyncIterator[Events]:
    """With the session that this client has."""
    url = http.base_url
    async with await trio.open_tcp_stream(url.host, url.port or 80) as stream:
        cookies = "; ".join(f"{name}={value}" for name, value in http.cookies.items())
        head = f"GET /dashboard/events HTTP/1.1\r\nhost: {url.netloc.decode()}\r\ncookie: {cookies}\r\n\r\n"
        await stream.send_all(head.encode())
        yield Events(stream)
