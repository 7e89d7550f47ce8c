"""What went wrong with a call, as a `RouterError` whose message names the cause and where it was looked for."""

import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import responses
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
import msgspec

from xim_agent.errors import AgentError, Exit
from xim_agent.outcome import CODES, NOT_A_ROUTER, Action, RouterError, classify
from xim_agent.text import printable

PROTOCOL = 1
CONNECT_SECONDS = 10.0
_PROXY = "check HTTPS_PROXY and NO_PROXY"


def date_of(headers: Mapping[str, str]) -> float | None:
    """The Date header in Unix seconds."""
    return _seconds(headers.get("date", ""))


@lru_cache(4)
def _seconds(date: str) -> float | None:
    """A hundred replies a second have the same one."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds from Retry-After, which may be a number or a date; the date is compared with the reply's own Date."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - (date_of(headers) or now))
    except (ValueError, TypeError, OverflowError):
        return None


def what(method: str, url: httpx.URL) -> str:
    """For messages: without query, which may hold a signature, and without user and password."""
    return f"{method} {url.copy_with(query=None, fragment=None, userinfo=b'')}"


def malformed(what: str, reason: str) -> RouterError:
    """A reply came and makes no sense: retry class."""
    return RouterError("reply_malformed", f"{what}: the reply cannot be read: {reason}")


def too_large(what: str, limit: int) -> RouterError:
    """`limit` in bytes. Retry class too, for those who call again in any case."""
    return RouterError("reply_too_large", f"{what}: the reply has more than {limit} bytes")


def from_reply(what: str, status: int, headers: Mapping[str, str], body: bytes, now: float) -> RouterError:
    """`what`: method and URL; `headers` with lower-case names; `body` decoded."""
    try:
        problem = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = {}
    word = problem.get("code")
    # Codes become keys of counters and labels of metrics, so a router cannot make up new ones.
    word = word if isinstance(word, str) else ""
    code = word if word in CODES else f"http_{status}"
    detail = problem.get("detail") or problem.get("title")
    message = f"{what}: {status} {printable(word)[:100] or responses.get(status, 'without a name')}"
    message += f": {printable(detail)[:500]}" if isinstance(detail, str) else ""
    hint = NOT_A_ROUTER if code != word and classify(status, code) is Action.FINAL else ""
    if classify(status, code) is Action.PROTOCOL:
        message += f"; the router speaks {printable(str(problem.get('protocols')))[:100]}, this agent [{PROTOCOL}]"
        hint = "install the agent version that belongs to this router"
    elif 300 <= status < 400:
        message += f" (redirects are not followed here; location: {_place(headers.get('location', ''))})"
    date = date_of(headers)
    return RouterError(
        code,
        message,
        status=status,
        problem=problem,
        retry_after=retry_after(headers, now),
        date_skew=None if date is None else date - now,
        hint=hint,
    )


def _place(location: str) -> str:
    """Where a redirect leads, without what may be a secret: user, query, fragment."""
    try:
        url = httpx.URL(location).copy_with(query=None, fragment=None, userinfo=b"")
    except (httpx.InvalidURL, ValueError):
        return "unreadable"
    return printable(str(url))[:200]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [one.__context__, one.__cause__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions


def proxy_for(url: httpx.URL) -> str | None:
    """`host:port` of the system's proxy for this URL, without its credentials."""
    proxy = getproxies().get(url.scheme) or getproxies().get("all")
    if not proxy or is_loopback(url.host) or proxy_bypass(url.host):
        return None
    try:
        parsed = httpx.URL(proxy if "://" in proxy else f"http://{proxy}")
    except httpx.InvalidURL:
        return "an unreadable address"
    return f"{parsed.host}:{parsed.port}" if parsed.port else parsed.host


def unusable_proxy() -> AgentError:
    """Of the proxy settings in this environment at least one is of no use to us."""
    names = sorted(name for name in os.environ if name.lower().endswith("_proxy"))
    return AgentError(
        "proxy_invalid",
        f"the proxy settings of this environment cannot be used: one of {', '.join(names)}",
        hint="only http:// and https:// proxies are supported; NO_PROXY is a list of host names",
        exit_code=Exit.CONFIG,
    )


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdecimal())


def from_transport(what: str, url: httpx.URL, error: httpx.TransportError) -> RouterError:
    """No reply came: DNS, refused, time limit, TLS or proxy, in the first words of the message."""
    causes = list(_chain(error))
    place = f"{url.host}:{url.port or (443 if url.scheme == 'https' else 80)}"
    proxy = proxy_for(url)
    tls = next((c for c in causes if isinstance(c, ssl.SSLError)), None)
    if isinstance(error, httpx.ProxyError):
        code, text = "proxy_failed", f"proxy {proxy or 'of the system'} refused: {error}"
    elif any(isinstance(c, socket.gaierror) for c in causes):
        code, text = "dns_failed", f"the name {proxy or url.host} cannot be resolved"
    elif isinstance(tls, ssl.SSLCertVerificationError):
        code, text = "tls_failed", f"the TLS certificate of {place} is not trusted: {tls.verify_message}"
        text += "".join(f"; {note}" for note in getattr(tls, "__notes__", ()))
    elif tls is not None:
        code, text = "tls_failed", f"TLS with {place} failed: {tls.reason or tls}"
    elif isinstance(error, httpx.ConnectTimeout):
        code, text = "connect_timeout", f"no connection to {proxy or place} within {CONNECT_SECONDS:.0f} s"
    elif any(isinstance(c, ConnectionRefusedError) for c in causes):
        code, text = "connection_refused", f"{proxy or place} refused the connection"
    elif isinstance(error, httpx.ConnectError):
        code, text = "connect_failed", f"no connection to {proxy or place}: {error}"
    elif isinstance(error, httpx.TimeoutException):
        code, text = "silence", f"{place} was silent for too long"
    else:
        code, text = "connection_lost", f"the connection to {place} was lost: {str(error) or type(error).__name__}"
    via = f" (through proxy {proxy})" if proxy and code != "proxy_failed" else ""
    hints = {
        "tls_failed": "set SSL_CERT_FILE to the CA of the router, or check for a proxy that opens TLS",
        "connect_timeout": "a firewall may drop it: check that this host may reach that address",
        "connection_refused": "check address and port, and that the router runs",
        "connect_failed": "check the network of this host and the router's address",
        "silence": "see the router's log; something in between may hold the reply back",
        "connection_lost": "see the router's log",
        "dns_failed": "check the router's address and the resolver of this host",
        "proxy_failed": _PROXY,
    }
    behind = proxy and code in ("connection_refused", "connect_timeout", "connect_failed", "dns_failed")
    hint = _PROXY if behind else hints.get(code, "")
    return RouterError(code, f"{text}{via} ({what})", hint=hint)
