"""Connections that cannot hurt each other; addresses and TLS of `router serve`."""

import ipaddress
import logging
import resource
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as ServerConfig

from xim_agent.errors import AgentError, Exit
from xim_agent.router.connection import Connection
from xim_agent.router.incoming import PATIENCE_SECONDS
from xim_agent.router.replies import full

log = logging.getLogger("xim_agent.router")

MOST_FILES = 1_048_576  # what the kernel itself allows a process by default
RESERVED = 64  # open files that are no connections: the database, listeners, chunks that are being sent
TOLD = 32  # connections over the limit that are told so; they take from RESERVED, more of them are closed at once
WARN_SECONDS = 60.0
FEW = 4096  # open files with which a router is told before it happens that they will not do for a fleet
_RAISE = "raise it by LimitNOFILE= (systemd), --ulimit nofile= (docker) or `ulimit -n`"
_BROKEN = (h11.ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError)


class Server:
    """hypercorn's HTTP/1.1 for single connections: its own `serve` waits for clients that do not read, for ever.

    `most`: connections at once; those that come then are refused, and those that are there go on.
    """

    def __init__(self, app: Any, patience: float = PATIENCE_SECONDS, most: int | None = None) -> None:
        self._app = ASGIWrapper(app)
        refuse: Any = full
        self._full = ASGIWrapper(refuse)
        self._most = max(TOLD, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED) if most is None else most
        self._open = 0
        self._warned = float("-inf")
        self._patience = patience
        self._config = ServerConfig()
        self._config.keep_alive_timeout = 75.0
        self._config.keep_alive_max_requests = sys.maxsize  # an agent makes a hundred calls a second on one of them
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("xim_agent.router.http")

    async def connection(self, stream: Any) -> None:
        """Until either side closes it, or it is cancelled. What goes wrong on a connection ends that connection."""
        app = self._app
        if self._open >= self._most:
            self._warn()
            app = self._full
            if self._open >= self._most + TOLD:
                await trio.aclose_forcefully(stream)
                return
        self._open += 1
        try:
            await Connection(app, self._config, stream, self._patience).run()
        except* _BROKEN as group:
            log.debug("connection broke", extra={"error": repr(group.exceptions[0])})
        except* Exception:
            # Anybody may connect: a mistake of ours that one caller finds must not end the service for the others.
            log.exception("connection failed")
        finally:
            self._open -= 1

    def _warn(self) -> None:
        """Not for every caller: those that are refused come back every few seconds."""
        if trio.current_time() - self._warned >= WARN_SECONDS:
            self._warned = trio.current_time()
            log.warning(
                "connections are refused: %d are open, as many as the limit on open files allows; %s",
                self._open,
                _RAISE,
            )


def raise_file_limit() -> None:
    """Every agent and every client takes one or two open files, and 1024 are usual until a process asks for more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    with suppress(ValueError, OSError):  # what there is must do then
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FEW:
        room = max(TOLD, files - RESERVED)
        log.warning("the limit on open files leaves room for %d agents and clients at once; %s", room, _RAISE)


def parse_listen(listen: str) -> tuple[str, int]:
    """HOST:PORT or [V6]:PORT. Raises AgentError `listen_invalid`."""
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        message = f"--listen {listen!r} is not HOST:PORT"
        raise AgentError("listen_invalid", message, hint="for example 127.0.0.1:8080", exit_code=Exit.USAGE)
    return host, int(port)


def everywhere(host: str) -> bool:
    """Whether it is no address that anybody can call."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def bound_url(name: tuple[Any, ...], scheme: str) -> str:
    """Of a socket's own address."""
    host, port = name[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def open_tls(cert: Path, key: Path | None) -> ssl.SSLContext:
    """Raises AgentError `tls_certificate`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        message = f"the TLS certificate {cert} cannot be used: {error}"
        hint = "--tls-cert is the PEM chain, --tls-key its private key"
        raise AgentError("tls_certificate", message, hint=hint, exit_code=Exit.CONFIG) from error
    return context
