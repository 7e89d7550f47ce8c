"""API keys for the dashboard."""

from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from xim_agent.clock import Clock
from xim_agent.router import catalog, names
from xim_agent.router.dashboard import form
from xim_agent.router.dashboard.join import projects
from xim_agent.router.dashboard.parts import Handler, Viewer, asked, reply
from xim_agent.router.store import Store


class ApiKeys:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.reads: dict[str, Handler] = {"/dashboard/api/keys": self._list}
        self.writes: dict[str, Handler] = {
            "/dashboard/api/keys": self._create,
            "/dashboard/api/keys/{id}/revoke": self._revoke,
        }

    async def _list(self, request: Request, _: Viewer) -> ASGIApp:
        return reply(self._listed())

    def _listed(self) -> dict[str, Any]:
        return {"keys": catalog.api_keys(self._store.db), "projects": projects(self._store)}

    async def _create(self, request: Request, _: Viewer) -> ASGIApp:
        """The key's text is in this reply and nowhere else."""
        given = await asked(request)
        project = form.checked(given, "project", names.project_name)
        name = form.checked(given, "name", names.key_name, "")
        key = catalog.create_api_key(self._store.db, project, self._clock.now(), name)
        return reply(
            {"key": key, "project": project, "name": name, "base_url": f"{self._store.public_urls[0]}/v1"}, 201
        )

    async def _revoke(self, request: Request, _: Viewer) -> ASGIApp:
        with form.told():
            catalog.revoke_api_key(self._store.db, request.path_params["id"], self._clock.now())
        return reply(self._listed())
