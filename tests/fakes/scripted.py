"""A whole stack of executables in which only the engine is scripted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fakes.engine import FAKE, write_model
from fakes.stack import Stack, running


class Scripted(Stack):
    def env(self, **more: str) -> dict[str, str]:
        return super().env(**({"XEROTIER_AGENT_VLLM_ARGS": "--seed 1", "XEROTIER_AGENT_VLLM_ENV": ""} | more))


S = TypeVar("S", bound=Scripted)


@contextmanager
def serving(kind: type[S], exe: Path, place: Path) -> Iterator[S]:
    """A ready agent that serves the model `toy`."""
    stack = kind(str(exe), str(FAKE), write_model(place / "model"), place / "stack", served="toy")
    with running(stack):
        stack.start_agent(XEROTIER_AGENT_JOIN_KEY=stack.join_key)
        stack.wait_ready(60)
        yield stack
