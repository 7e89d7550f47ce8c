"""What an operator's words for vLLM show to others: secrets are masked, by the name they are given to. Pure."""

import re
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import unquote, urlsplit

HIDDEN = "***"
# None are --passive, --max-num-batched-tokens and --tokenizer.
_NAME = r"key|secret|pass(?:phrase|(?![a-vx-z]))|credential|token(?!s\b|iz)"
_SECRET = re.compile(_NAME, re.IGNORECASE)
_MEMBER = re.compile(  # of a value that is JSON
    rf'("[^"]*(?:{_NAME})[^"]*"\s*:\s*)("(?:[^"\\]|\\.)*"|[^",{{\[\]}}\s]+)', re.IGNORECASE
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


def secret_words(arguments: Iterable[str], pairs: Iterable[str], urls: Iterable[str]) -> set[str]:
    """What must never be seen of these: values that `masked_arguments` hides, values of KEY=VALUE pairs whose key
    speaks of a secret, who a URL (of a proxy, say) logs in as.
    """
    arguments = list(arguments)
    found = {part for word in arguments for _, part in _MEMBER.findall(word)}
    for word, shown in zip(arguments, masked_arguments(arguments), strict=True):
        if word.startswith("-") and shown.endswith("=" + HIDDEN):
            found.add(word.partition("=")[2])
        elif shown == HIDDEN:
            found.add(word)
    found |= {value for key, _, value in (pair.partition("=") for pair in pairs) if _SECRET.search(key)}
    for url in urls:
        with suppress(ValueError):
            parts = urlsplit(url if "//" in url else f"//{url}")
            who = parts.password or parts.username or ""  # a token may come without a password
            found |= {who, unquote(who)}
    return {word.strip('"') for word in found} - {""}


def masked_pairs(words: Iterable[str]) -> tuple[str, ...]:
    """KEY=VALUE pairs without any value: which of them are secrets nobody knows."""
    return tuple(f"{word.partition('=')[0]}={HIDDEN}" for word in words)
