"""The agent's side of identity in memory, against the router's real functions over a real database."""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio
from msgspec import json as msgjson

from xim_agent.errors import AgentError, Exit
from xim_agent.health import Health
from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.rotation import State
from xim_agent.identity.service import IdentityService
from xim_agent.outcome import RouterError
from xim_agent.router import enrollment, join_keys, keyring
from xim_agent.router.store import Store
from xim_agent.router.tokens import Problem, Proof, RouterKeys, verify_bearer, verify_dpop

URL = "http://127.0.0.1:8080"
OTHER = "https://other.example"
EPOCH = 1_700_000_000.0


class WallClock:
    """Wall time that moves with trio's clock; `offset` in seconds makes it wrong."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        return EPOCH + self.offset + trio.current_time()


class MemoryStore:
    """A state file without a disk: what `save` was given comes back from `load` as it would from JSON."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.aside: dict[str, bytes | None] = {}
        self.fail = False

    def load(self) -> State | None:
        return None if self.data is None else msgjson.decode(self.data, type=State)

    async def save(self, state: State) -> None:
        await trio.lowlevel.checkpoint()
        if self.fail:
            raise AgentError("state_write_failed", "no space left on device", exit_code=Exit.STATE)
        self.data = msgjson.encode(state)

    async def set_aside(self, suffix: str, instead: State | None) -> Path:
        await trio.lowlevel.checkpoint()
        self.aside[suffix], self.data = self.data, None if instead is None else msgjson.encode(instead)
        return Path(f"enrollment.json.{suffix}")


class Router:
    """An EnrollTransport. `down`: URLs that refuse connections; `lose`: replies to lose after the router committed."""

    def __init__(self, store: Store, urls: tuple[str, ...] = (URL, OTHER)) -> None:
        self.store = store
        self.urls = urls
        self.clock = WallClock()
        self.caller = WallClock()
        self.keys: RouterKeys = keyring.open_keys(store.db, URL, EPOCH)
        self.replay = enrollment.Replay()
        self.down: set[str] = set()
        self.lose = 0
        self.tamper: Callable[[dict[str, Any]], dict[str, Any]] = lambda reply: reply
        self.enrolls = 0
        self.refreshes = 0
        self.delay = 0.0

    def rotate(self, **how: int) -> None:
        """As `router rotate-signing-key` beside a running router."""
        keyring.rotate(self.db, self.clock.now(), **how)
        self.keys = keyring.open_keys(self.db, URL, self.clock.now())

    def accepts(self, token: str) -> bool:
        """Whether a work call with this token would be served."""
        try:
            claims = verify_bearer(token, self.keys, URL, self.clock.now())
            enrollment.standing(self.db, claims.agent_id, claims.jti)
        except Problem:
            return False
        return True

    def join_key(self, *, uses: int = 1, expires_at: float | None = None) -> JoinKey:
        _, text = join_keys.create(
            self.store.db,
            self.keys,
            project="demo",
            region="eu",
            uses=uses,
            expires_at=expires_at,
            tiers=["self_hosted"],
            public_urls=self.urls,
            now=EPOCH,
        )
        return JoinKey.parse(text)

    async def enroll(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]:
        self.enrolls += 1
        now = self.clock.now()
        return await self._answer(
            router,
            "/v1/enroll",
            proof,
            request,
            lambda p, b: enrollment.enroll(self.db, self.keys, b, p, now, "1.2.3.4"),
        )

    async def refresh(self, router: str, proof: str, request: dict[str, Any]) -> dict[str, Any]:
        self.refreshes += 1
        now = self.clock.now()
        return await self._answer(
            router, "/v1/enroll/refresh", proof, request, lambda p, b: enrollment.refresh(self.db, self.keys, b, p, now)
        )

    @property
    def skew(self) -> float:
        return self.clock.now() - self.caller.now()

    @property
    def db(self) -> Any:
        return self.store.db

    def one(self, query: str) -> Any:
        return self.db.execute(query).fetchone()[0]

    async def _answer(
        self, router: str, path: str, proof: str, request: dict[str, Any], act: Callable[[Proof, Any], dict[str, Any]]
    ) -> dict[str, Any]:
        await trio.sleep(self.delay)
        if router in self.down:
            raise RouterError("unreachable", f"cannot connect to {router}")
        now = self.clock.now()
        try:
            accepted = verify_dpop(proof, method="POST", urls=self.urls, path=path, now=now)
            self.replay.check(accepted, now)
            reply = act(accepted, json.loads(json.dumps(request)))
        except Problem as problem:
            raise RouterError(
                problem.code, problem.detail, status=problem.status, problem=problem.extra, date_skew=self.skew
            ) from None
        if self.lose:
            self.lose -= 1
            raise RouterError("cut", "the connection was cut before the reply")
        return self.tamper(reply)


class Agent:
    """Builds services on one state and one router, as successive starts of one agent would."""

    def __init__(self, router: Router, join_key: JoinKey | None = None, *, rand: float = 0.5) -> None:
        self.router = router
        self.join_key = join_key
        self.store = MemoryStore()
        self.clock = router.caller = WallClock()
        self.rand = rand
        self.health = Health(now=self.clock.now)
        self.router_url: str | None = None
        self.key_error: AgentError | None = None

    def ask_join_key(self) -> JoinKey | None:
        if self.key_error is not None:
            raise self.key_error
        return self.join_key

    def start(self) -> IdentityService:
        return IdentityService(
            store=self.store,
            transport=self.router,
            clock=self.clock,
            health=self.health,
            join_key=self.ask_join_key,
            router_url=self.router_url,
            agent_info={"name": "box", "version": "0", "os": "linux", "arch": "x86_64", "hostname": "box"},
            hardware=lambda: {"accelerator": "cpu"},
            max_concurrent=None,
            rand=lambda: self.rand,
        )

    @property
    def codes(self) -> set[str]:
        return {condition.code for condition in self.health.conditions()}


def assignment(router: Router, agent_id: str, **changes: Any) -> str:
    payload = {
        "sub": agent_id,
        "iat": int(router.clock.now()),
        "generation": 1,
        "model": {"id": "m1", "name": "toy", "revision": "r1", "manifest": "sha256:" + "0" * 64, "size_bytes": 1},
        "serving": {"served_model_name": "toy"},
    }
    return router.keys.sign_assignment({**payload, **changes})


async def running(service: IdentityService, body: Callable[[], Awaitable[None]]) -> None:
    """Runs `body` beside the service, then stops both; raises what ended the service."""
    failure: AgentError | None = None

    async def serve(scope: trio.CancelScope) -> None:
        nonlocal failure
        try:
            await service.run()
        except AgentError as error:
            failure = error
            scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, nursery.cancel_scope)
        await body()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def some_hours() -> None:
    """Virtual time: long enough for anything to happen that would."""
    await trio.sleep(4 * 3600)


async def until(check: Callable[[], object], every: float = 1) -> None:
    """Virtual time: waits for what another task of the test brings about; `every`: seconds between two looks."""
    for _ in range(10_000):
        if check():
            return
        await trio.sleep(every)
    raise AssertionError("it never came")


@contextmanager
def opened(directory: Path) -> Iterator[Router]:
    with Store.open(directory) as store:
        yield Router(store)
