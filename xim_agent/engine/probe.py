"""Asks a running vLLM: healthy? counters? one token? Over connections of its own, with its own time limits."""

import json
from enum import Enum

import httpx
import trio

from xim_agent.engine.client import connect
from xim_agent.errors import AgentError
from xim_agent.mesh.messages import Task

LOOK_SECONDS = 5.0
_ONE = {
    "generate": ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "temperature": 0}),
    "embed": ("/v1/embeddings", {"input": "Hi"}),
    "score": ("/v1/score", {"text_1": "Hi", "text_2": "Hi"}),
}


class Answer(Enum):
    """Of /health. NONE: nobody accepts (not started, or dead); SLOW: accepted but late (load); FAILED: it says no."""

    OK = "ok"
    FAILED = "failed"
    SLOW = "slow"
    NONE = "none"


class ProbeFailed(AgentError):
    """The engine answers, and cannot do its work."""


def _nobody_there(error: BaseException | None) -> bool:
    """A full backlog is an error of connecting too, but means load."""
    while error is not None:
        if isinstance(
            error, ConnectionRefusedError | ConnectionResetError | FileNotFoundError | httpx.RemoteProtocolError
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


class Probe:
    def __init__(self, socket: str, task: Task) -> None:
        self._http = connect(socket)
        self._task = task

    async def aclose(self) -> None:
        await self._http.aclose()

    async def health(self) -> Answer:
        with trio.move_on_after(LOOK_SECONDS):
            try:
                reply = await self._http.get("/health")
            except httpx.HTTPError as error:
                return Answer.NONE if _nobody_there(error) else Answer.SLOW
            return Answer.OK if reply.status_code == 200 else Answer.FAILED
        return Answer.SLOW

    async def metrics(self) -> str | None:
        """None when it does not come in time or in order: that is load, not death."""
        with trio.move_on_after(LOOK_SECONDS):
            try:
                reply = await self._http.get("/metrics")
            except httpx.HTTPError:
                return None
            return reply.text if reply.status_code == 200 else None
        return None

    async def one_token(self) -> None:
        """Returns when one token (embedding, score) was made, however long that takes. Raises ProbeFailed.

        A score model may refuse our two words with a 4xx (templates, more inputs): the engine is proven all the same.
        """
        path, body = _ONE[self._task]
        try:
            reply = await self._http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            raise ProbeFailed("engine_unproven", f"{path} ended with {error!r}") from error
        if reply.status_code != 200 and not (self._task == "score" and 400 <= reply.status_code < 500):
            raise ProbeFailed("engine_unproven", f"{path} answers {reply.status_code}: {reply.text[:500]}")
