"""One call of the running agent over its control socket."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from xim_agent.errors import AgentError, Exit

# The agent says something at least once a second.
SILENCE = 10.0


async def call(socket: Path, pid: str, name: str, arguments: Mapping[str, Any], report: Callable[[Any], None]) -> Any:
    """The result. `pid`: of the agent, for messages; `report` is given what the call says of its progress.

    Raises what the call raised, and AgentError `agent_unreachable`, `agent_silent`, `agent_gone`, `agent_older`.
    Cancellation cancels the call in the agent.
    """
    transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)  # no TLS, so no CAs to load
    timeout = httpx.Timeout(SILENCE)
    try:
        async with (
            httpx.AsyncClient(transport=transport, trust_env=False, timeout=timeout) as client,
            client.stream("POST", f"http://agent/{name}", json=dict(arguments)) as reply,
        ):
            answer: Any = None
            # Read to its end whatever it says: httpx leaves generators behind when it is not.
            async for line in reply.aiter_lines():
                answer = _line(line, report) if answer is None else answer
    except (httpx.ConnectError, httpx.ConnectTimeout) as e:
        raise _unreachable(socket, pid, e) from e
    except httpx.TimeoutException as e:
        raise AgentError(
            "agent_silent",
            f"the agent, process {pid}, has said nothing for {SILENCE:.0f} s",
            hint=f"it hangs or is stopped: look at its log and at `ps -o stat,wchan -p {pid}`; "
            f"`kill {pid}` ends it, `kill -9 {pid}` if that does not help",
            exit_code=Exit.ALREADY_RUNNING,
        ) from e
    except httpx.HTTPError as e:
        raise _gone(pid, f"{type(e).__name__}: {e}".rstrip(": ")) from e
    if answer is None:
        raise _gone(pid, "it ended without a result")
    if "error" in answer:
        raise _error(answer["error"])
    return answer["result"]


def _line(line: str, report: Callable[[Any], None]) -> Any:
    """The answer when this is it."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not {"progress", "result", "error"} & value.keys():
        message = f"the agent's answer makes no sense: {line[:200]!r}"
        return {"error": {"code": "agent_gone", "message": message, "exit_code": Exit.ALREADY_RUNNING}}
    if "progress" not in value:
        return value
    if value["progress"] is not None:
        report(value["progress"])
    return None


def _error(value: dict[str, Any]) -> AgentError:
    if value["code"] == "control_unknown":
        return AgentError(
            "agent_older",
            f"the running agent does not know this command: {value['message']}",
            hint="restart the agent, it is an older version than this command",
            exit_code=Exit.ALREADY_RUNNING,
        )
    code = int(value.get("exit_code", Exit.BUG))
    return AgentError(value["code"], value["message"], hint=value.get("hint", ""), exit_code=code)


def _unreachable(socket: Path, pid: str, error: Exception) -> AgentError:
    return AgentError(
        "agent_unreachable",
        f"process {pid} holds the cache, but its control socket {socket} cannot be opened: {error}",
        hint=f"run this as the user of that process (`ps -o user,args -p {pid}`) or as root, and in its container if "
        "it is in one",
        exit_code=Exit.ALREADY_RUNNING,
    )


def _gone(pid: str, why: str) -> AgentError:
    return AgentError(
        "agent_gone",
        f"the answer of the agent, process {pid}, broke off: {why}",
        hint="see the agent's log; when it has ended, run this again",
        exit_code=Exit.ALREADY_RUNNING,
    )
