"""Published models for the dashboard: sizes, who serves them, who is to, and removal."""

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from starlette.requests import Request
from starlette.types import ASGIApp

from xim_agent.router import catalog, models
from xim_agent.router.dashboard import form
from xim_agent.router.dashboard.parts import Handler, Viewer, asked, reply
from xim_agent.router.dispatch import Dispatch
from xim_agent.router.sql import rows
from xim_agent.router.store import Store

log = logging.getLogger("xim_agent.router.dashboard")


class Models:
    """`changed`: has the router look at its database again; its own changes are no news to it otherwise."""

    def __init__(self, store: Store, dispatch: Dispatch, changed: Callable[[], None]) -> None:
        self._store = store
        self._dispatch = dispatch
        self._changed = changed
        self.reads: dict[str, Handler] = {"/dashboard/api/models": self._list}
        self.writes: dict[str, Handler] = {
            "/dashboard/api/models/assign": self._assign,
            "/dashboard/api/models/unassign": self._unassign,
            "/dashboard/api/models/remove": self._remove,
        }

    async def _list(self, request: Request, _: Viewer) -> ASGIApp:
        return reply(self._listed())

    def _listed(self) -> dict[str, Any]:
        db, running = self._store.db, self._dispatch.agents
        query = "SELECT agent_id AS id, name, project FROM agents WHERE state != 'removed' ORDER BY name, agent_id"
        agents = rows(db, query)
        names = {agent["id"]: agent["name"] for agent in agents}
        ids = {(model.name, model.revision): model.id for model in catalog.models(db)}
        found = []
        for model in models.listed(db):
            key = (ids[model["model"], model["revision"]], model["revision"])
            serving = [
                {"id": one.id, "name": names.get(one.id, one.id)}
                for one in running.values()
                if one.key is not None and one.model is not None and (one.model.id, one.model.revision) == key
            ]
            found.append({**model, "agents": [_who(who, names) for who in model["agents"]], "serving": serving})
        with form.told():
            busy = models.busy(self._store.directory)
        command = f"xerotier-xim-agent router model publish PATH --name NAME --data {shlex.quote(self._data)}"
        return {"models": found, "agents": agents, "publishing": busy, "publish": command}

    @property
    def _data(self) -> str:
        return str(self._store.directory.absolute())

    async def _assign(self, request: Request, _: Viewer) -> ASGIApp:
        given = await asked(request)
        agent = form.optional(given, "agent")
        with form.told("agent" if agent else "model"):
            catalog.assign(self._store.db, form.text(given, "model"), form.optional(given, "revision"), agent)
        return self._done()

    async def _unassign(self, request: Request, _: Viewer) -> ASGIApp:
        given = await asked(request)
        agent = form.optional(given, "agent")
        with form.told():
            catalog.unassign(self._store.db, form.text(given, "model"), form.text(given, "revision"), agent)
        return self._done()

    async def _remove(self, request: Request, _: Viewer) -> ASGIApp:
        given = await asked(request)
        name, revision = form.text(given, "model"), form.text(given, "revision")
        with form.told():
            freed = await trio.to_thread.run_sync(_remove, self._store.directory, name, revision)
        log.info("a model was removed", extra={"model": name, "revision": revision, "bytes": freed})
        return self._done()

    def _done(self) -> ASGIApp:
        self._changed()
        return reply(self._listed())


def _remove(directory: Path, name: str, revision: str) -> int:
    """In a thread, with a connection of its own: the disk may take its time. Bytes that it freed."""
    with Store.open(directory) as store:
        return models.remove(directory, store.db, name, revision)[1].bytes


def _who(agent_id: str, names: dict[str, str]) -> dict[str, Any]:
    """An id of None means all that have no other assignment."""
    if agent_id == catalog.ALL:
        return {"id": None, "name": "all agents"}
    return {"id": agent_id, "name": names.get(agent_id, agent_id)}
