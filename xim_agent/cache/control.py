"""`Commands` as calls of the control socket: plain arguments in, plain values out."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from xim_agent.cache.admin import Commands
from xim_agent.errors import AgentError, Exit

Report = Callable[[Any], None]


def calls(commands: Commands) -> dict[str, Callable[[Mapping[str, Any], Report], Awaitable[Any]]]:
    """By the name that stands in the URL. All raise AgentError as `Commands` does, and `control_request`."""

    async def ls(arguments: Mapping[str, Any], report: Report) -> Any:
        return await commands.ls()

    async def path(arguments: Mapping[str, Any], report: Report) -> Any:
        return await commands.path(_word(arguments))

    async def rm(arguments: Mapping[str, Any], report: Report) -> Any:
        return await commands.rm(_word(arguments))

    async def prune(arguments: Mapping[str, Any], report: Report) -> Any:
        return await commands.prune(bool(arguments.get("everything")), bool(arguments.get("dry_run")))

    async def verify(arguments: Mapping[str, Any], report: Report) -> Any:
        target = None if arguments.get("model") is None else _word(arguments)
        return await commands.verify(target, lambda done, total: report([done, total]))

    return {"cache/ls": ls, "cache/path": path, "cache/rm": rm, "cache/prune": prune, "cache/verify": verify}


def _word(arguments: Mapping[str, Any]) -> str:
    word = arguments.get("model")
    if not isinstance(word, str) or not word:
        raise AgentError("control_request", "a model must be named", exit_code=Exit.USAGE)
    return word
