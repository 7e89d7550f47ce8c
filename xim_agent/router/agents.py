"""The router's side of every call an agent makes, but for models (wire-protocol §3 to §5)."""

import json
import logging
from typing import Any

import trio
from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response

from xim_agent.clock import Clock
from xim_agent.identity.claims import Claims
from xim_agent.mesh import codec
from xim_agent.mesh.codec import CodecError
from xim_agent.mesh.messages import ModelState
from xim_agent.router import catalog, enrollment, replies, roster
from xim_agent.router.dispatch import AgentSuspended, CloneDetected, Dispatch
from xim_agent.router.fleet import Duty
from xim_agent.router.guesses import Guesses
from xim_agent.router.settle import Frame
from xim_agent.router.store import Store
from xim_agent.router.tokens import Problem, Proof, verify_bearer, verify_dpop
from xim_agent.watch import Watch

log = logging.getLogger("xim_agent.router")

MAX_IDENTITY = 64 * 1024
KEEP_TOKENS = 10_000


class AgentApi:
    """Handlers by path. Agents are judged by their row in the database at every call."""

    def __init__(self, store: Store, dispatch: Dispatch, clock: Clock) -> None:
        self._store = store
        self._dispatch = dispatch
        self._clock = clock
        self._keys = store.keys(clock.now())
        self._replay = enrollment.Replay()
        self._guesses = Guesses()
        self._tokens: dict[str, Claims] = {}
        self._seen: dict[str, float] = {}
        self._known: set[str] = set()

    # -- admission --

    def anyone(self, request: Request) -> None:
        """For calls that carry their own proof."""
        replies.check_protocol(request.headers)

    def agent(self, request: Request) -> Claims:
        """The caller's token, checked. Raises Problem 426, 401, 410."""
        replies.check_protocol(request.headers)
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        now = self._clock.now()
        claims = self._tokens.get(token)
        if claims is None or claims.exp <= now or kind.lower() != "bearer":
            claims = verify_bearer(token if kind.lower() == "bearer" else None, self._keys, self._keys.issuer, now)
            if len(self._tokens) >= KEEP_TOKENS:
                self._tokens.clear()
            self._tokens[token] = claims
        enrollment.standing(self._store.db, claims.agent_id, claims.jti)
        return claims

    # -- identity --

    async def enroll(self, request: Request, _: None) -> Response:
        remote = request.client.host if request.client else ""
        self._guesses.check(remote, trio.current_time())
        body, proof = await self._proven(request)
        try:
            reply = enrollment.enroll(self._store.db, self._keys, body, proof, self._clock.now(), remote)
        except Problem as problem:
            if problem.code == "join_key_invalid":
                self._guesses.wrong(remote, trio.current_time())
                log.warning("an unknown join key was presented", extra={"from": remote})
            raise
        self._dispatch.board.diary.note(reply["agent_id"], trio.current_time(), "enrolled", f"from {remote}")
        log.info("agent enrolled", extra={"agent_id": reply["agent_id"], "project": reply["project"], "from": remote})
        return replies.packed(request, json.dumps(reply).encode(), "application/json", 201)

    async def refresh(self, request: Request, _: None) -> Response:
        body, proof = await self._proven(request)
        reply = enrollment.refresh(self._store.db, self._keys, body, proof, self._clock.now())
        return replies.packed(request, json.dumps(reply).encode(), "application/json")

    async def leave(self, request: Request, who: Claims) -> Response:
        roster.remove(self._store.db, who.agent_id, self._clock.now(), who="")
        self._dispatch.remove(who.agent_id, trio.current_time())
        log.info("agent left", extra={"agent_id": who.agent_id})
        return Response(status_code=204)

    async def _proven(self, request: Request) -> tuple[dict[str, Any], Proof]:
        now = self._clock.now()
        urls, path = self._store.public_urls, request.scope["path"]
        proof = verify_dpop(request.headers.get("dpop"), method="POST", urls=urls, path=path, now=now)
        self._replay.check(proof, now)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Problem(400, "invalid_request", "the body is no JSON object")
        return body, proof

    # -- work --

    async def assignment(self, request: Request, who: Claims) -> Response:
        assigned = catalog.assignment(self._store.db, who.agent_id)
        if assigned is None:
            return Response(status_code=204)
        signed = self._keys.sign_assignment(assigned.payload(who.agent_id, self._clock.now()))
        return replies.packed(request, signed.encode(), "application/jose")

    async def poll(self, request: Request, who: Claims) -> Response:
        """Held until there is something to say; closed by the agent, it was never answered."""
        try:
            asked = codec.decode_poll_request(await request.body())
        except CodecError as error:
            raise _malformed(error) from None
        watch, now = Watch(), trio.current_time()
        self._seen[who.agent_id] = self._clock.now()
        try:
            poll = self._dispatch.poll(
                who.agent_id,
                self._duty(who),
                asked,
                serves=self._serves(asked.model),
                address=_address(request),
                wake=watch.bump,
                now=now,
                wall=self._clock.now(),
            )
        except CloneDetected as clone:
            extra = {"address": clone.address, "start": clone.start, "yours": clone.yours}
            log.warning("one identity in two places", extra={"agent_id": who.agent_id, **extra})
            raise Problem(409, "identity_in_use", str(clone), extra) from None
        except AgentSuspended:
            raise Problem(403, "agent_suspended", "the agent is suspended by the router's operator") from None
        try:
            seen = 0
            while (reply := self._dispatch.answer(poll, trio.current_time())) is None:
                with trio.move_on_at(poll.until):
                    seen = await watch.wait_beyond(seen)
        finally:
            self._dispatch.abandon(poll, trio.current_time())
            self._seen[who.agent_id] = self._clock.now()
        return replies.message(request, reply)

    async def events(self, request: Request, who: Claims) -> Response:
        try:
            batch = codec.decode_events_request(await request.body())
        except CodecError as error:
            raise _malformed(error) from None
        frames = [_frame(raw) for raw in batch.frames]
        return replies.message(request, self._dispatch.events(who.agent_id, batch.boot, frames, trio.current_time()))

    async def lease_body(self, request: Request, who: Claims) -> Response:
        job = self._dispatch.held_job(who.agent_id, request.path_params["request"])
        if job is None:
            raise Problem(404, "lease_unknown", "this agent holds no lease for the request")
        return replies.packed(request, job.body, "application/octet-stream")

    # -- what the database says --

    def reload(self) -> None:
        """Something in the database was changed by another process."""
        before, self._keys = self._keys, self._store.keys(self._clock.now())
        self._tokens.clear()
        now = trio.current_time()
        for agent in list(self._dispatch.agents.values()):
            if agent.poll is not None and before.public.keys() - self._keys.public.keys():
                self._dispatch.abandon(agent.poll, now)  # its token may be by a key that is out: the next call tells
            try:
                duty = self._duty_of(agent.id, agent.duty.project)
            except Problem:
                self._dispatch.remove(agent.id, now)
            else:
                self._dispatch.assign(agent.id, duty, self._serves(agent.model), now)

    def save_seen(self) -> None:
        """Writes when each agent was last heard and what changed with it; what was not written is kept.

        Raises sqlite3.Error.
        """
        diary, start = self._dispatch.board.diary, self._clock.now() - trio.current_time()
        self._store.save_seen(self._seen, [(who, start + e.at, e.kind, e.text, "") for who, e in diary.unwritten()])
        diary.written()
        self._known |= self._seen.keys()
        self._seen = {}

    @property
    def newcomers(self) -> bool:
        """Whether an agent was heard for the first time since the router started, and that is not written yet."""
        return not self._seen.keys() <= self._known

    def _duty(self, who: Claims) -> Duty:
        return self._duty_of(who.agent_id, who.project)

    def _duty_of(self, agent_id: str, project: str) -> Duty:
        suspended = enrollment.standing(self._store.db, agent_id) == "suspended"
        assigned = catalog.assignment(self._store.db, agent_id)
        drain = roster.drains(self._store.db, agent_id)
        if assigned is None:
            return Duty(project, suspended=suspended, drain=drain)
        return Duty(project, assigned.generation, assigned.model.name, suspended, drain)

    def _serves(self, model: ModelState | None) -> str | None:
        return catalog.model_name(self._store.db, model.id, model.revision) if model else None


def _frame(raw: Raw) -> Frame:
    """A bad frame costs its own lease; one that does not even name a lease costs the call."""
    try:
        lease, seq, _, payload = codec.decode_frame(raw)
    except CodecError as error:
        found = codec.frame_lease(raw)
        if found is None:
            raise _malformed(error) from None
        return found, 0, None
    return lease, seq, payload


def _malformed(error: CodecError) -> Problem:
    return Problem(413 if error.code == "too_large" else 400, "invalid_request", f"the body cannot be read: {error}")


def _address(request: Request) -> str:
    return f"{request.client.host}:{request.client.port}" if request.client else "an unknown address"
