"""What `status`, `drain` and `resume` share."""

from collections.abc import Callable, Mapping
from typing import Any

from xim_agent.cli.common import asked, ignore

ONLY = frozenset({"model_cache_path"})
CODES = """

The agent is found by its model cache.

\b
Exit codes:
  0   done
  1   no agent runs
  2   wrong usage
  14  the agent hangs, is older, or ended meanwhile
  77  its files or its socket are not yours to use
  78  a setting is wrong
  130 Ctrl-C
"""


def ask(
    flags: Mapping[str, Any], name: str, arguments: Mapping[str, Any], report: Callable[[Any], None] = ignore
) -> Any:
    """What the running agent says to `name`."""
    from xim_agent.cli.agent_reach import reach

    return asked(reach, flags, name, arguments, report)


def runs(found: Mapping[str, Any]) -> str:
    """How many requests run; `found`: an answer of `drain` or `resume`."""
    number, longest = found["running"], found["longest"]
    if not number:
        return "no request runs"
    return f"{number} request{'s' * (number > 1)} run{'s' * (number == 1)}, the longest for {longest['seconds']:.0f} s"
