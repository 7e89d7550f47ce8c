"""What an operator asks the running agent for, beside its cache: how it is, to drain, to take work again."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

log = logging.getLogger("xim_agent.control")

Report = Callable[[Any], None]
Call = Callable[[Mapping[str, Any], Report], Awaitable[Any]]
REPORT_SECONDS = 0.5
OPERATOR = "an operator"


def calls(
    *,
    status: Callable[[], dict[str, Any]],
    requests: Callable[[], dict[str, Any]],
    logs: Callable[[], dict[str, Any]],
    drain: Callable[[], None],
    resume: Callable[[], None],
    drained_by: Callable[[], list[str]],
    drained: Callable[[], Awaitable[None]],
) -> dict[str, Call]:
    """By the name that stands in the URL.

    `status`, `requests` and `logs` give what can be JSON; `drained` returns when no request runs.

    `drain` holds until `resume` or the end of the process. With `wait` its call returns when no request runs any more
    or somebody has resumed; a cut one leaves the drain as it is.
    """

    def teller(look: Callable[[], dict[str, Any]]) -> Call:
        async def tell(arguments: Mapping[str, Any], report: Report) -> Any:
            await trio.lowlevel.checkpoint()
            return look()

        return tell

    def now() -> dict[str, Any]:
        found = status()["work"]
        sender = found["sender"]
        return {"drained_by": drained_by(), "running": sender["running"], "longest": sender["longest"]}

    async def begin(arguments: Mapping[str, Any], report: Report) -> Any:
        log.info("an operator asks to drain")
        drain()
        await trio.lowlevel.checkpoint()
        while arguments.get("wait") and OPERATOR in drained_by() and (found := now())["running"]:
            report(found)
            with trio.move_on_after(REPORT_SECONDS):
                await drained()
        return now()

    async def end(arguments: Mapping[str, Any], report: Report) -> Any:
        log.info("an operator ends the drain")
        resume()
        await trio.lowlevel.checkpoint()
        return now()

    looks = {"status": teller(status), "requests": teller(requests), "logs": teller(logs)}
    return looks | {"drain": begin, "resume": end}
