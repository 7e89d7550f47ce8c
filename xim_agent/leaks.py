"""Looks for secrets where none may be: as they are, and as others may have written them down. Pure."""

import base64
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote, unquote_plus

_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_WORDS = re.compile(r"\s|\\[nrt]")


def find(members: Mapping[str, str], secrets: Mapping[str, str]) -> list[tuple[str, str]]:
    """(member, kind of secret) of each that is found; `secrets`: value → kind. Never a value.

    A secret is found as it is, percent-encoded in part or as a whole, in hexadecimal, and within base64 of either
    alphabet whatever stands before it and wherever it is wrapped.
    """
    found = set()
    for member, text in members.items():
        joined = _WORDS.sub("", text)
        plain = [text, unquote(text), unquote_plus(text)]
        encoded = joined.replace("-", "+").replace("_", "/")
        for secret, kind in secrets.items():
            in_hex = secret.encode().hex()
            if (
                any(secret in one for one in plain)
                or in_hex in joined.lower()
                or any(core in encoded for core in _base64(secret.encode()))
            ):
                found.add((member, kind))
        if _PEM.search(text):
            found.add((member, "private key in PEM"))
    return sorted(found)


def _base64(secret: bytes) -> Iterator[str]:
    """What its base64 always holds, for each of the three places it can begin at."""
    for before in range(3):
        whole = base64.b64encode(bytes(before) + secret).decode()
        first = (0, 2, 3)[before]
        last = len(whole) - (0, 3, 2)[(before + len(secret)) % 3]
        yield whole[first:last].rstrip("=")
