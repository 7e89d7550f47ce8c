"""Is a router there, and how far does one get: name, connection, TLS, protocol. By one call without a credential."""

from dataclasses import dataclass

import httpx
import trio

from xim_agent.clock import Clock
from xim_agent.errors import AgentError
from xim_agent.mesh import failures
from xim_agent.mesh.transport import Transport
from xim_agent.outcome import NOT_A_ROUTER, Action, RouterError

# Needs a token on every router, changes nothing there, and is refused with 401 without one.
PATH = "/v1/assignment"
TLS_SECONDS = 5.0
_LIMIT = 64 * 1024
_STEPS = {
    "dns_failed": "DNS",
    "connect_timeout": "TCP",
    "connection_refused": "TCP",
    "connect_failed": "TCP",
    "tls_failed": "TLS",
    "proxy_failed": "proxy",
}


@dataclass(frozen=True)
class Reached:
    """`step` that failed: settings, DNS, TCP, proxy, TLS or protocol; empty, with no error, when a XIM router answered.

    `skew`: seconds, the Date of its reply minus our clock; None when there was none. `via`: a proxy's host:port.
    """

    router: str
    step: str = ""
    error: AgentError | None = None
    skew: float | None = None
    via: str | None = None


async def reach(router: str, *, insecure: bool, clock: Clock) -> Reached:
    """Takes 35 s at most: resolver, connection, reply. Raises nothing for a router that is not there."""
    try:
        transport = Transport(insecure=insecure, clock=clock, on_skew=lambda _: None)
    except AgentError as error:
        return Reached(router, "settings", error)
    try:
        url = transport.url(router, PATH)
    except AgentError as error:
        await transport.aclose()
        return Reached(router, "settings", error)
    via, found = failures.proxy_for(url), None
    try:
        await transport.call("GET", url, {}, limit=_LIMIT)
        found = RouterError("reply_malformed", f"GET {url}: 2xx without a credential", hint=NOT_A_ROUTER)
    except RouterError as error:
        # No token is what it must complain of; whoever does so by our codes is a router.
        found = None if error.action is Action.REFRESH else error
    finally:
        await transport.aclose()
    skew = transport.statistics().skew
    if found is None:
        return Reached(router, skew=skew, via=via)
    step = _STEPS.get(found.code, "protocol")
    if step == "TCP" and via is None and url.scheme == "https" and await _listens(url):
        step = "TLS"
    return Reached(router, step, found, skew, via)


async def _listens(url: httpx.URL) -> bool:
    """The time limit of a connection includes the handshake: whose silence was it?"""
    with trio.move_on_after(TLS_SECONDS):
        try:
            stream = await trio.open_tcp_stream(url.host, url.port or 443)
        except OSError:
            return False
        await stream.aclose()
        return True
    return False
