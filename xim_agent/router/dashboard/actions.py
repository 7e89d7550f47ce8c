"""One agent for the dashboard: everything that is known of it, and what an operator may do with it."""

from collections.abc import Callable
from typing import Any

import trio
from starlette.requests import Request
from starlette.types import ASGIApp

from xim_agent.clock import Clock
from xim_agent.errors import AgentError
from xim_agent.router import catalog, chronicle, roster
from xim_agent.router.dashboard.parts import Handler, Viewer, reply
from xim_agent.router.dashboard.view import agent_detail, agent_view
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.replies import ApiError
from xim_agent.router.sql import row
from xim_agent.router.store import Store

ACTIONS: dict[str, Callable[..., None]] = {
    "suspend": roster.suspend,
    "resume": roster.resume,
    "drain": roster.drain,
    "undrain": roster.undrain,
    "remove": roster.remove,
    "revoke-credentials": roster.revoke_credentials,
}


class Agents:
    """`changed`: has the router look at its database again; its own changes are no news to it otherwise."""

    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock, changed: Callable[[], None]) -> None:
        self._store = store
        self._dispatch = dispatch
        self._clock = clock
        self._changed = changed
        self.reads: dict[str, Handler] = {"/dashboard/api/agents/{id}": self._detail}
        self.writes: dict[str, Handler] = {"/dashboard/api/agents/{id}/{action}": self._act}

    async def _detail(self, request: Request, _: Viewer) -> ASGIApp:
        return reply(self.detail(request.path_params["id"]))

    async def _act(self, request: Request, viewer: Viewer) -> ASGIApp:
        agent_id, name = request.path_params["id"], request.path_params["action"]
        act = ACTIONS.get(name)
        if act is None:
            known = ", ".join(ACTIONS)
            raise ApiError(404, "action_unknown", f"{name!r:.100} is nothing that can be done with an agent: {known}")
        self._row(agent_id)
        try:
            act(self._store.db, agent_id, self._clock.now(), who="dashboard")
        except AgentError as error:
            raise ApiError(409, error.code, f"{error.message}: {error.hint}") from None
        self._changed()
        return reply(self.detail(agent_id))

    def detail(self, agent_id: str) -> dict[str, Any]:
        """Everything of one agent; of one that was removed what is left. Raises ApiError 404."""
        found, db = self._row(agent_id), self._store.db
        now, wall, dispatch = trio.current_time(), self._clock.now(), self._dispatch
        agent, assigned = dispatch.agents.get(agent_id), catalog.assignment(db, agent_id)
        lately = dispatch.board.diary.of(agent_id)
        events = chronicle.recorded(db, agent_id)
        events += [{"at": wall - now + e.at, "kind": e.kind, "text": e.text, "who": ""} for e in lately]
        events.sort(key=lambda event: event["at"])
        return {
            "time": wall,
            **agent_view(found, agent, assigned, now=now, wall=wall, limits=dispatch.limits),
            **agent_detail(found, agent, drain=roster.drains(db, agent_id), events=events, now=now, wall=wall),
        }

    def _row(self, agent_id: str) -> dict[str, Any]:
        found = row(self._store.db, "SELECT * FROM agents WHERE agent_id=?", (agent_id,))
        if found is None:
            raise ApiError(
                404, "agent_unknown", f"no agent {agent_id!r:.100} is enrolled here; the list shows those that are"
            )
        return found
