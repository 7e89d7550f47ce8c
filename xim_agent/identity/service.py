"""The agent's identity while it runs: load or enroll, renew, hand out the token, judge assignments (wire-protocol §3).

One task (`run`) makes every call that changes the identity; the others ask it and wait. So there is never more than one
refresh in flight, and cancelling a poll cuts none.
"""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import trio

from xim_agent.clock import Clock
from xim_agent.errors import AgentError
from xim_agent.health import Health
from xim_agent.identity import refusals
from xim_agent.identity.bearer import Bearer, IdentityStatistics, Tokens
from xim_agent.identity.claims import TokenRefused
from xim_agent.identity.exchange import EnrollTransport, Exchange
from xim_agent.identity.join_key import JoinKey
from xim_agent.identity.memory import Memory, Store
from xim_agent.identity.rotation import Enrollment
from xim_agent.identity.trouble import Trouble
from xim_agent.identity.verifier import AssignmentVerifier
from xim_agent.outcome import Action, RouterError
from xim_agent.watch import Watch

FORCED_INTERVAL = 10.0  # seconds between two refreshes that others asked for, wire-protocol §2
# So long after an enrollment the join key is not presented again. Later it may be, in the same start, too: with the
# agent's key it spends no further use, and an operator who revoked a credential wants no stranded host.
AGAIN_SECONDS = 600.0
LONGEST_LIFE = 86400.0  # seconds: however long a token lives, its successor is fetched once a day at least

log = logging.getLogger("xim_agent.identity")


class IdentityService:
    """`agent_info` is `{name, version, os, arch, hostname}`; `hardware` gives the report of §3.6 when it is needed.

    `join_key` is asked only then, too: a key that cannot be read (AgentError, exit 78) is no matter once enrolled.
    """

    def __init__(
        self,
        *,
        store: Store,
        transport: EnrollTransport,
        clock: Clock,
        health: Health,
        join_key: Callable[[], JoinKey | None],
        router_url: str | None,
        agent_info: dict[str, Any],
        hardware: Callable[[], dict[str, Any]],
        max_concurrent: int | None,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._memory = Memory(store)
        self.assignments = AssignmentVerifier(self._memory, self._newest_keys)
        self._transport = transport
        self._clock = clock
        self._join_key = join_key
        self._override = (router_url,) if router_url else None
        self._agent_info = agent_info
        self._hardware = hardware
        self._max_concurrent = max_concurrent
        self._rand = rand
        self._refusal: RouterError | None = None  # the stored credential is refused; only the join key can help
        self._enrolled_at = float("-inf")
        self._tokens = Tokens()
        self._tries = Watch()
        self._demand = trio.Event()
        # Called when the assignment that is remembered is not signed by a key of the router's newest set any more.
        self.outdated: Callable[[], None] = lambda: None
        self._running = self._busy = False
        self._forced_at = float("-inf")
        self._trouble = Trouble(health)
        self._enrollments = self._refreshes = 0
        self._last_refresh: float | None = None

    # what the other parts use

    @property
    def enrolled(self) -> bool:
        """Whether a credential is stored. Raises AgentError, exit 77, when the state cannot be used."""
        return self._memory.enrollment is not None

    async def wait_bearer(self) -> Bearer:
        """Waits until there is a token that has not expired."""
        return await self._tokens.wait()

    async def refused(self, token: str) -> None:
        """After a 401 for `token`: returns when a refresh was tried, at once when none is due or a newer one is there.

        Many callers share one refresh. Cancellation leaves the refresh running.
        """
        if self._tokens.current is not None and self._tokens.current.token == token:
            await self._force()
        else:
            await trio.lowlevel.checkpoint()

    def unreachable(self) -> None:
        """Work calls get no answer: from now on the bearer names the next router, if there are several."""
        self._tokens.next_router(self._override or (self._memory.enrollment.routers if self._memory.enrollment else ()))

    async def left(self) -> Path:
        """After `leave`: keeps the state under another name, which is returned. The next start makes a new agent."""
        self._tokens.drop()
        return await self._memory.set_aside("left", keep_key=False)

    async def removed(self) -> AgentError:
        """After a 410 `agent_removed`: what to end the process with. The state is kept under another name.

        The key stays in use, so that the router knows this agent if the same join key is presented again: it is not
        for the agent to come back by itself.
        """
        self._tokens.drop()
        old = self._memory.enrollment
        if old is None:
            return refusals.removed(None, None)
        return refusals.removed(old.agent_id, await self._memory.set_aside("removed", keep_key=True))

    def statistics(self) -> IdentityStatistics:
        enrollment = self._memory.enrollment
        return IdentityStatistics(
            **{name: getattr(enrollment, name, "") for name in ("agent_id", "worker_id", "project", "region")},
            router=self._tokens.current.router if self._tokens.current else "",
            enrolled=enrollment is not None,
            token_expires=claims.exp if (claims := self._tokens.claims) else None,
            last_refresh=self._last_refresh,
            enrollments=self._enrollments,
            refreshes=self._refreshes,
            failures=dict(self._trouble.failures),
        )

    async def enroll_once(self) -> Enrollment:
        """One round over the routers. With a credential that works it says so and changes nothing but the token.

        Raises AgentError with the exit code of the cause, 69 when no router answered.
        """
        try:
            await self._renew()
        except RouterError as error:
            await self._fatal(error)
        enrollment = self._memory.enrollment
        assert enrollment is not None
        if not self._enrollments:
            log.info("already enrolled, nothing to do", extra={"agent_id": enrollment.agent_id})
        return enrollment

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps a token at hand until cancelled; `started` once the state on disk has been read.

        Raises AgentError when only a person can help (exit 10 to 15, 77, 78). Cancellation leaves the state whole.
        """
        self._use_stored_token()
        task_status.started()
        self._running = True
        try:
            while True:
                delay = await self._attempt()
                with trio.move_on_after(delay):
                    await self._demand.wait()
        finally:
            self._running = False

    def _use_stored_token(self) -> None:
        """Work can start with the last run's token while the refresh of this start is under way."""
        old = self._memory.enrollment
        if old is None:
            if self._join_key() is None:
                raise refusals.no_credential()
            return
        try:
            if self._join_key() is not None:
                log.info("join key ignored: this agent is enrolled", extra={"agent_id": old.agent_id})
        except AgentError as error:
            log.warning(f"join key ignored, this agent is enrolled: {error.message}", extra={"code": error.code})
        if (found := old.claims(self._clock.now())) is not None:
            left = found.exp - self._clock.now()
            self._tokens.publish(old.token, found, (self._override or old.routers)[0], left)

    async def _attempt(self) -> float:
        """Seconds until the next attempt: half of the token's life ± 10 % after a success, else the backoff's."""
        self._busy = True
        try:
            await self._renew()
        except AgentError as error:
            return await self._failed(error)
        else:
            claims = self._tokens.claims
            assert claims is not None
            self._trouble.over()
            return min(claims.exp - claims.iat, LONGEST_LIFE) * (0.45 + 0.1 * self._rand())
        finally:
            self._busy = False
            self._demand = trio.Event()
            self._tries.bump()

    async def _failed(self, error: AgentError) -> float:
        """Raises what ends the process; else reports, and gives the seconds to wait."""
        enrolling = not self.enrolled or self._refusal is not None
        if isinstance(error, RouterError):
            if error.action not in refusals.TRANSIENT:
                await self._fatal(error)
        elif isinstance(error, TokenRefused):
            if enrolling and not error.clock:
                raise error
        elif error.code != "state_write_failed" or not self.enrolled:
            raise error
        what = "enrollment" if enrolling else "refresh"
        return self._trouble.note(error, what, self._transport.skew, self._rand())

    async def _fatal(self, error: RouterError) -> NoReturn:
        if error.action is Action.REMOVED:
            raise await self.removed() from error
        raise refusals.explain(error) from error

    async def _renew(self) -> None:
        """One round: newest refresh token, the previous, the join key; each only when all before it were refused."""
        old = self._memory.enrollment
        if old is not None and self._refusal is None:
            self._refusal = await self._refresh(old)
        if old is None or self._refusal is not None:
            await self._enroll()

    async def _refresh(self, old: Enrollment) -> RouterError | None:
        """None when a refresh token worked, else the router's refusal of the last one tried."""
        began = trio.current_time()
        exchange = Exchange(self._transport, self._clock, await self._memory.key())
        refusal = None
        for presented in old.presentable():
            try:
                fresh, found, router = await exchange.refresh(old, presented, self._override or old.routers)
            except RouterError as error:
                if error.action is not Action.ENROLL_AGAIN:
                    raise
                log.warning("refresh token refused", extra={"code": error.code, "newest": refusal is None})
                refusal = error
                continue
            if await self._memory.keep(fresh):
                self.outdated()
            self._refreshes, self._last_refresh = self._refreshes + 1, self._clock.now()
            self._tokens.publish(fresh.token, found, router, found.exp - found.iat)
            extra = {"router": router, "life_seconds": found.exp - found.iat, "seconds": _since(began)}
            log.debug("token refreshed", extra=extra)
            return None
        return refusal

    async def _enroll(self) -> None:
        began = trio.current_time()
        used = self._refusal is not None and began < self._enrolled_at + AGAIN_SECONDS
        if (join_key := None if used else self._join_key()) is None:
            also = "with the join key it enrolled a moment ago already" if used else ""
            raise refusals.credential_refused(self._refusal, also) if self._refusal else refusals.no_credential()
        about = {"agent": self._agent_info, "hardware": self._hardware(), "max_concurrent": self._max_concurrent}
        exchange = Exchange(self._transport, self._clock, await self._memory.key())
        try:
            fresh, found, router = await exchange.enroll(join_key, self._override or join_key.routers, about)
        except RouterError as error:
            if self._refusal is not None and error.action is Action.JOIN_KEY:
                raise refusals.credential_refused(self._refusal, refusals.explain(error).message) from error
            raise
        await self._memory.keep(fresh)
        self._refusal, self._enrolled_at = None, trio.current_time()
        self._enrollments += 1
        self._tokens.publish(fresh.token, found, router, found.exp - found.iat)
        extra = {"agent_id": fresh.agent_id, "router": router, "project": fresh.project, "region": fresh.region}
        log.info(f"enrollment successful: {fresh.agent_id}", extra=extra | {"seconds": _since(began)})

    async def _newest_keys(self) -> bool:
        before = self._refreshes
        await self._force(patient=True)
        return self._refreshes > before

    async def _force(self, patient: bool = False) -> None:
        """Has `run` refresh now; returns when the attempt is over.

        Less than 10 s after it was asked for before, nothing happens, or (`patient`) it happens when these are over.
        """
        due = max(self._forced_at + FORCED_INTERVAL, self._trouble.not_before)
        if not (self._busy or self._demand.is_set()):
            if patient and self._running:
                await trio.sleep_until(due)
            elif not self._running or trio.current_time() < due:
                await trio.lowlevel.checkpoint()
                return
        seen = self._tries.version
        if not (self._busy or self._demand.is_set()):
            self._forced_at = trio.current_time()
            self._demand.set()
        await self._tries.wait_beyond(seen)


def _since(began: float) -> float:
    return round(trio.current_time() - began, 4)
