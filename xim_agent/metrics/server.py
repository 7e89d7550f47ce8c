"""The metrics port: /metrics, /livez, /readyz, /status over plain HTTP, by default on loopback only."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from xim_agent.errors import AgentError, Exit
from xim_agent.metrics.openmetrics import Unconverted, converted
from xim_agent.metrics.registry import Collector

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
OPEN_EXPOSITION = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_END = "# EOF\n"
_log = logging.getLogger("xim_agent.metrics")
# hypercorn announces its address by itself at info; ours has the fields.
_server_log = _log.getChild("http")
_server_log.setLevel(logging.WARNING)


class MetricsServer:
    """Four questions, asked anew for every request.

    `collect`: our series; in OpenMetrics, with exemplars, for a scraper that asks for it. `engine_text`: vLLM's last
    exposition, may be empty. `ready`: the reasons against being ready, none when ready. `status`: a snapshot of
    dataclasses and plain values. `redact` takes secrets out of answers. `cure`: of an address that cannot be had.
    """

    def __init__(
        self,
        *,
        collect: Collector,
        ready: Callable[[], list[str]],
        status: Callable[[], dict[str, Any]],
        engine_text: Callable[[], bytes],
        redact: Callable[[str], str],
        cure: str = "set --metrics-port to a free port (0: any), or --disable-metrics-server",
    ) -> None:
        self._cure = cure
        self._redact = redact
        self._collect = collect
        self._odd = ""
        self._ready = ready
        self._status = status
        self._engine_text = engine_text

    def app(self) -> Starlette:
        paths = {"/metrics": self._metrics, "/livez": self._livez, "/readyz": self._readyz, "/status": self._snapshot}
        return Starlette(routes=[Route(path, endpoint) for path, endpoint in paths.items()])

    async def run(  # noqa: ASYNC128  hypercorn calls started()
        self, host: str, port: int, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until cancelled, which cuts open connections; started with the bound URLs, so port 0 works.

        Raises AgentError `metrics_address` when the address cannot be had.
        """
        config = ServerConfig()
        config.bind = [f"fd://{_listen(host, port, self._cure)}"]
        config.errorlog = _server_log
        config.include_server_header = False
        await serve(self.app(), config, task_status=task_status)  # type: ignore[arg-type]  # starlette's own ASGI types

    async def _metrics(self, request: Request) -> Response:
        engine = self._engine_text().decode(errors="replace")
        if _accepts_openmetrics(request.headers.get("accept", "")):
            try:
                theirs = converted(engine)
            except Unconverted as odd:
                if str(odd) != self._odd:
                    _log.warning("vLLM's metrics cannot be given in OpenMetrics", extra={"reason": str(odd)})
                self._odd = str(odd)
            else:
                ours = self._collect.openmetrics().decode().removesuffix(_END)
                return Response(self._redact(ours + theirs + _END), media_type=OPEN_EXPOSITION)
        return Response(self._redact(self._collect.text().decode() + engine), media_type=EXPOSITION)

    async def _livez(self, request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def _readyz(self, request: Request) -> Response:
        reasons = self._ready()
        if not reasons:
            return PlainTextResponse("ready\n")
        text = "".join(f"not ready: {reason}\n" for reason in reasons)
        return PlainTextResponse(self._redact(text), status_code=503)

    async def _snapshot(self, request: Request) -> Response:
        body = msgspec.json.encode(self._status(), enc_hook=str).decode()
        return Response(self._redact(body), media_type="application/json")


def _accepts_openmetrics(accept: str) -> bool:
    """Also beside other formats, whatever their weights are: who can read it has the exemplars by it."""
    for one in accept.split(","):
        kind, *parameters = (word.strip().lower() for word in one.split(";"))
        if kind == "application/openmetrics-text" and not {"q=0", "q=0.0"} & set(parameters):
            return True
    return False


def _listen(host: str, port: int, cure: str) -> int:
    """The descriptor of a listening socket, to be owned by the server."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family).detach()
    except OSError as error:
        raise AgentError(
            "metrics_address",
            f"cannot serve metrics on {host} port {port}: {error.strerror or error}",
            hint=cure,
            exit_code=Exit.CONFIG,
        ) from error
