"""The control socket: how commands of an operator on this host reach the running agent.

HTTP on a Unix socket that only the agent's user and root can open. `POST /NAME` with an object of arguments; the answer
is lines of JSON: `{"progress": …}` any number of times, at least one a second so that silence means a hung agent, then
`{"result": …}` or `{"error": …}`. A client that goes away cancels its call. A new command is one more entry of `calls`.
"""

import errno
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from xim_agent.errors import AgentError, Exit

log = logging.getLogger("xim_agent.control")
# hypercorn announces its address by itself at info; ours has the fields.
_server_log = log.getChild("http")
_server_log.setLevel(logging.WARNING)

BEAT = 1.0
MAX_BODY = 64 * 1024


# Arguments and `report` → the result. `report` may be called often; what it was given last is sent, once a second.
Call = Callable[[Mapping[str, Any], Callable[[Any], None]], Awaitable[Any]]


class ControlServer:
    """`announce` is told the socket's path when it listens; `calls` by name, which is the path of the URL."""

    def __init__(self, path: Path, calls: Mapping[str, Call], announce: Callable[[str], None]) -> None:
        self._path, self._calls, self._announce = path, calls, announce

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled, which cuts running calls; then the socket is removed.

        Raises AgentError `control_socket` when the socket cannot be had.
        """
        config = ServerConfig()
        config.bind = [f"fd://{listen(self._path)}"]
        config.errorlog = _server_log
        config.include_server_header = False
        config.graceful_timeout = 0
        app = Starlette(routes=[Route("/{name:path}", _Endpoint(self._calls), methods=["POST"])])
        self._announce(str(self._path))
        log.debug("control socket listens", extra={"path": str(self._path)})
        task_status.started()
        try:
            await serve(app, config)  # type: ignore[arg-type]  # starlette's own ASGI types
        finally:
            self._path.unlink(missing_ok=True)


def listen(path: Path) -> int:
    """The descriptor of a socket of mode 0600. What a dead agent left is replaced, a living one's is never taken.

    Raises AgentError `control_socket`.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead(path)
        server.bind(str(path))
        path.chmod(0o600)  # nobody can connect before it listens
        server.listen()
    except OSError as e:
        server.close()
        raise AgentError(
            "control_socket",
            f"cannot listen on {path}: {e.strerror or e}",
            hint="set XDG_RUNTIME_DIR or RUNTIME_DIRECTORY to a directory of this agent alone",
            exit_code=Exit.STATE,
        ) from e
    return server.detach()


def _remove_dead(path: Path) -> None:
    """Raises OSError where somebody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError as e:  # of a plain file, too
            if not path.is_socket():
                raise FileExistsError(errno.EEXIST, "something else is in its place") from e
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # it lives, and is too busy to take one more
            pass
    raise OSError(errno.EADDRINUSE, "another agent listens there")


class _Endpoint:
    """ASGI, not a starlette function: those learn late that the client went away."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            call, arguments = self._find(scope["path_params"]["name"]), await _arguments(receive)
        except _Gone:
            return
        except AgentError as e:
            await _start(send, 404 if e.code == "control_unknown" else 400)
            await _line(send, _error(e), last=True)
            return
        await _start(send, 200)
        said = _Said()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_gone, receive, nursery.cancel_scope)
            nursery.start_soon(_work, call, arguments, said)
            while not said.done.is_set():
                await _line(send, {"progress": said.value})
                with trio.move_on_after(BEAT):
                    await said.done.wait()
            nursery.cancel_scope.cancel()
        if said.done.is_set():
            await _line(send, said.value, last=True)

    def _find(self, name: str) -> Call:
        if name not in self._calls:
            raise AgentError("control_unknown", f"this agent has no command {name[:100]!r}", hint="it is an older one")
        return self._calls[name]


class _Said:
    """The last progress that was reported; in the end the answer."""

    def __init__(self) -> None:
        self.value: Any = None
        self.done = trio.Event()

    def __call__(self, value: Any) -> None:
        self.value = value


class _Gone(Exception):
    """The client left before its request was complete: what it was about to ask is not done."""


async def _arguments(receive: Receive) -> dict[str, Any]:
    """Raises AgentError `control_request`, _Gone."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise AgentError("control_request", f"more than {MAX_BODY} bytes of arguments")
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as e:
        raise AgentError("control_request", f"the arguments are no JSON: {e}") from e
    if not isinstance(value, dict):
        raise AgentError("control_request", "the arguments are no object")
    return value


async def _work(call: Call, arguments: dict[str, Any], said: _Said) -> None:
    """What failed with a name goes to the client. A bug is logged by hypercorn, and the client's answer breaks off."""
    try:
        answer: dict[str, Any] = {"result": await call(arguments, said)}
    except AgentError as e:
        answer = _error(e)
    said.value = answer
    said.done.set()


def _error(e: AgentError) -> dict[str, Any]:
    return {"error": {"code": e.code, "message": e.message, "hint": e.hint, "exit_code": e.exit_code}}


async def _until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _start(send: Send, status: int) -> None:
    headers = [(b"content-type", b"application/x-ndjson")]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _line(send: Send, value: dict[str, Any], last: bool = False) -> None:
    body = json.dumps(value).encode() + b"\n"
    await send({"type": "http.response.body", "body": body, "more_body": not last})
