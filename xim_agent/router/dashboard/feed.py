"""The snapshot of everything that the pages show, made once for all who look, and the stream that keeps them live."""

import json
from collections.abc import Callable
from typing import Any

import trio
from starlette.types import ASGIApp, Receive, Scope, Send

from xim_agent.clock import Clock
from xim_agent.router import catalog
from xim_agent.router.dashboard.view import agent_view, model_view
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.replies import ApiError
from xim_agent.router.store import Store

EVERY = 1.0  # seconds between two looks; a change is shown within that
QUIET = 15.0  # said again so often, so that a dead connection is noticed
MOST = 256  # streams: every one is a connection, and a small part of every second


class Feed:
    """`open`: how many streams there are."""

    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock) -> None:
        self._store = store
        self._dispatch = dispatch
        self._clock = clock
        self.open = 0
        self.made = 0  # snapshots
        self._due = float("-inf")
        self._shown: dict[str, Any] = {}
        self._text = b""
        self._changes = 0

    def snapshot(self) -> dict[str, Any]:
        """Everything the pages show."""
        db, now, wall = self._store.db, trio.current_time(), self._clock.now()
        cursor = db.execute("SELECT * FROM agents WHERE state != 'removed' ORDER BY name, agent_id")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        agents = self._dispatch.agents
        views = [
            agent_view(
                row,
                agents.get(row["agent_id"]),
                catalog.assignment(db, row["agent_id"]),
                now=now,
                wall=wall,
                limits=self._dispatch.limits,
            )
            for row in rows
        ]
        running = [a.model for a in agents.values() if a.key is not None and a.model is not None]
        models = [
            model_view(m, sum((r.id, r.revision) == (m.id, m.revision) for r in running)) for m in catalog.models(db)
        ]
        queued = self._dispatch.statistics().queued
        return {"time": wall, "urls": self._store.public_urls, "agents": views, "models": models, "queued": queued}

    def stream(self, live: Callable[[], bool]) -> ASGIApp:
        """Server-sent events until `live` says no more. Raises ApiError 503 while there are too many."""
        if self.open >= MOST:
            raise ApiError(503, "dashboard_full", f"{self.open} dashboards are open, close one; this one tries again")

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            self.open += 1
            try:
                await self._stream(send, live)
            finally:
                self.open -= 1

        return run

    async def _stream(self, send: Send, live: Callable[[], bool]) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        seen, said = -1, float("-inf")
        while live():
            now = trio.current_time()
            self._look(now)
            if self._changes != seen or now - said >= QUIET:
                seen, said = self._changes, now
                await send({"type": "http.response.body", "body": b"data: " + self._text + b"\n\n", "more_body": True})
            await trio.sleep_until(self._due)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _look(self, now: float) -> None:
        """All streams wake together, and the first of them makes the snapshot."""
        if now < self._due:
            return
        found = self.snapshot()
        self.made += 1
        self._due = now + EVERY
        self._text = json.dumps(found, allow_nan=False).encode()
        shown = {name: value for name, value in found.items() if name != "time"}
        if shown != self._shown:
            self._shown, self._changes = shown, self._changes + 1
