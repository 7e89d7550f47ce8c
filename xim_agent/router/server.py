"""HTTP on connections of our own, so that a stop can close them; addresses and TLS of `router serve`."""

import logging
import ssl
from pathlib import Path
from typing import Any

import h11
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as ServerConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from xim_agent.errors import AgentError, Exit

log = logging.getLogger("xim_agent.router")
Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Server:
    """hypercorn's HTTP/1.1 for single connections: its own `serve` waits for clients that do not read, for ever."""

    def __init__(self, app: Any) -> None:
        self._app = ASGIWrapper(app)
        self._streams: set[Stream] = set()
        self._config = ServerConfig()
        self._config.keep_alive_timeout = 75.0
        self._config.include_server_header = False
        self._config.errorlog = logging.getLogger("xim_agent.router.http")
        self._context = WorkerContext(None)

    async def connection(self, stream: Any) -> None:
        """Until either side closes it. What goes wrong on a connection ends that connection."""
        self._streams.add(stream)
        try:
            await TCPServer(self._app, self._config, self._context, ConnectionState({}), stream).run()
        except* (h11.ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError, OSError) as group:
            log.debug("connection broke", extra={"error": repr(group.exceptions[0])})
        finally:
            self._streams.discard(stream)

    async def close_at_end(self) -> None:
        """Until cancelled, then closes all connections: a send is shielded and ends only when its socket does."""
        try:
            await trio.sleep_forever()
        finally:
            for stream in tuple(self._streams):
                (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket.close()


def parse_listen(listen: str) -> tuple[str, int]:
    """HOST:PORT or [V6]:PORT. Raises AgentError `listen_invalid`."""
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        message = f"--listen {listen!r} is not HOST:PORT"
        raise AgentError("listen_invalid", message, hint="for example 127.0.0.1:8080", exit_code=Exit.USAGE)
    return host, int(port)


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
