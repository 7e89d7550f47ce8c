"""What an operator's words for vLLM show to others: secrets are masked, by the name they are given to. Pure."""

import re
from collections.abc import Iterable

HIDDEN = "***"
_NAME = r"key|secret|passw|credential|token(?!s\b|iz)"  # max-num-batched-tokens and tokenizer are none
_SECRET = re.compile(_NAME, re.IGNORECASE)
_MEMBER = re.compile(  # of a value that is JSON
    rf'("[^"]*(?:{_NAME})[^"]*"\s*:\s*)(?:"(?:[^"\\]|\\.)*"|[^",{{\[\]}}\s]+)', re.IGNORECASE
)


def masked_arguments(words: Iterable[str]) -> tuple[str, ...]:
    """A command line without the values of flags whose name speaks of a secret: `--x=V`, `--x V` and `--x V V`."""
    shown = []
    hiding = False
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            hiding = _SECRET.search(name) is not None
            inline = HIDDEN if hiding else _MEMBER.sub(rf'\1"{HIDDEN}"', value)
            shown.append(name + equals + (inline if value else ""))
        else:
            shown.append(HIDDEN if hiding else _MEMBER.sub(rf'\1"{HIDDEN}"', word))
    return tuple(shown)


def masked_pairs(words: Iterable[str]) -> tuple[str, ...]:
    """KEY=VALUE pairs without any value: which of them are secrets nobody knows."""
    return tuple(f"{word.partition('=')[0]}={HIDDEN}" for word in words)
