"""Join keys for the dashboard: what there is, a new one with the ways to use it, and revocation."""

from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from xim_agent.clock import Clock
from xim_agent.router import join_keys, names
from xim_agent.router.dashboard import form, ways
from xim_agent.router.dashboard.parts import Handler, Viewer, asked, reply
from xim_agent.router.sql import rows
from xim_agent.router.store import Store

MOST_USES = 10_000
SHORTEST, LONGEST = 60, 3650 * 86400  # seconds that a key may be valid


class JoinKeys:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.reads: dict[str, Handler] = {"/dashboard/api/join-keys": self._list}
        self.writes: dict[str, Handler] = {
            "/dashboard/api/join-keys": self._create,
            "/dashboard/api/join-keys/{id}/revoke": self._revoke,
        }

    async def _list(self, request: Request, _: Viewer) -> ASGIApp:
        return reply(self._listed())

    def _listed(self) -> dict[str, Any]:
        db, urls = self._store.db, self._store.public_urls
        joined: dict[int, list[dict[str, Any]]] = {}
        for agent in rows(db, "SELECT join_key, agent_id AS id, name, state FROM agents ORDER BY enrolled"):
            joined.setdefault(agent.pop("join_key"), []).append(agent)
        keys = [{**key, "agents": joined.get(key["id"], [])} for key in join_keys.listed(db, self._clock.now())]
        return {"keys": keys, "projects": projects(self._store), "urls": urls, "only_here": ways.only_here(urls)}

    async def _create(self, request: Request, _: Viewer) -> ASGIApp:
        """The key's text is in this reply and nowhere else."""
        given, now = await asked(request), self._clock.now()
        project = form.checked(given, "project", names.project_name)
        region = form.text(given, "region", "local", most=24)
        uses = form.whole(given, "uses", 1, MOST_USES, 1)
        expires = now + form.whole(given, "lifetime", SHORTEST, LONGEST, 86400)
        with form.told("region"):
            number, key = self._store.create_join_key(
                project=project, region=region, uses=uses, expires_at=expires, now=now
            )
        urls = self._store.public_urls
        told = {"id": number, "project": project, "region": region, "uses": uses, "expires": expires}
        return reply({**told, "key": key, "urls": urls, "ways": ways.ways(key, urls)}, 201)

    async def _revoke(self, request: Request, _: Viewer) -> ASGIApp:
        number = form.number(request.path_params, "id")
        with form.told():
            join_keys.revoke(self._store.db, number, self._clock.now())
        return reply(self._listed())


def projects(store: Store) -> list[str]:
    """Those that a key or an agent names, in their order."""
    query = "SELECT project FROM join_keys UNION SELECT project FROM agents UNION SELECT project FROM api_keys"
    return [str(row["project"]) for row in rows(store.db, f"{query} ORDER BY 1")]
