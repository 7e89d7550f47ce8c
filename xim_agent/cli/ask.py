"""One question to an OpenAI server, its answer streamed to stdout."""

import json
import sys
from typing import Any

from xim_agent.errors import AgentError

# A model that never stops by itself must not keep the asker for its whole context.
MAX_TOKENS = 512


def _failed(what: str) -> AgentError:
    return AgentError("no_answer", what, exit_code=1)


def _text(data: str) -> str:
    """The new text of one event. Raises AgentError for an error event or one of another shape."""
    try:
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            raise _failed(str(error.get("message", error)) if isinstance(error, dict) else str(error))
        return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _failed(f"an event of the answer makes no sense: {data[:200]}") from error


async def ask(url: str, key: str, model: str, prompt: str) -> None:
    """Writes the answer, as it comes, and a newline to stdout.

    Raises AgentError `no_answer` when there is none, or only a part of one.
    """
    import httpx

    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    body |= {"stream": True, "temperature": 0, "max_tokens": MAX_TOKENS}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(10, read=300)) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as reply,
        ):
            if reply.status_code != 200:
                text = (await reply.aread()).decode(errors="replace")
                raise _failed(f"{reply.status_code} from {url}: {text[:500]}")
            complete, failure = False, _failed("the answer broke off")
            # Read to its end whatever it says: httpx leaves generators behind when it is not.
            async for line in reply.aiter_lines():
                complete = complete or line == "data: [DONE]"
                if line.startswith("data: ") and not complete:
                    try:
                        _write(_text(line.removeprefix("data: ")))
                    except AgentError as error:
                        failure = error
    except httpx.HTTPError as error:
        raise _failed(f"{type(error).__name__} from {url}: {error}") from error
    _write("\n")
    if not complete:
        raise failure


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
