"""The same request to the engine itself and through router and agent, compared byte for byte."""

import re
from typing import Any

import httpx
from fakes.stack import Stack


def mask(body: bytes) -> bytes:
    body = re.sub(rb'"((?:item_|call_|response_)?id)":"[a-z-]+[-_][0-9a-f-]+"', rb'"\1":"X"', body)
    return re.sub(rb'"((?:created|completed)(?:_at)?)":[\d.]+', rb'"\1":0', body)


def ask_both(stack: Stack, path: str, body: dict[str, Any]) -> list[tuple[httpx.Response, httpx.Response]]:
    """Of the engine itself and through the whole path, the same; every pair until they are, the last one is."""
    stack.direct(path, body)  # fills the prefix cache, so that both have the same cached_tokens
    # vLLM itself puts two tokens into one event now and then, when the machine is busy: a few tries, all complete.
    pairs = [(stack.direct(path, body), stack.post(path, body))]
    while mask(pairs[-1][0].content) != mask(pairs[-1][1].content) and len(pairs) < 8:
        pairs.append((stack.direct(path, body), stack.post(path, body)))
    direct, through = pairs[-1]
    assert through.status_code == direct.status_code
    assert mask(through.content) == mask(direct.content)
    assert through.headers["content-type"] == direct.headers["content-type"]
    return pairs
