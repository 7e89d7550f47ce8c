"""The join key: what a new agent needs to find its router and to know that it is the right one (wire §3.1)."""

import json
import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from xim_agent.errors import AgentError, Exit
from xim_agent.identity.jose import JoseError, b64u, json_object, unb64u

VERSION = 1
MAX_BYTES = 8192
_SLUG = re.compile(r"[a-z0-9-]{1,63}")


def router_url(text: object) -> str:
    """A router's base URL without a trailing slash. Raises ValueError with the reason."""
    if not isinstance(text, str) or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a router URL is not plain text")
    url = urlsplit(text)
    if url.username is not None or "@" in text or url.query or url.fragment:
        raise ValueError("a router URL has no user, query or fragment")
    if url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError(f"{text[:200]!r} is not an http(s) URL")
    if url.port == 0:
        raise ValueError(f"{text[:200]!r} has no port to connect to")
    return text.rstrip("/")


def parse_router_url(text: str) -> str:
    """The same for the operator's own setting. Raises AgentError `router_url_malformed`, exit 78."""
    try:
        return router_url(text.strip())
    except ValueError as error:
        raise AgentError(
            "router_url_malformed",
            f"the router URL is malformed: {error}",
            hint="give a base URL such as https://router.example:8443",
            exit_code=Exit.CONFIG,
        ) from None


@dataclass(frozen=True)
class JoinKey:
    """`pin` is the RFC 7638 thumbprint of the router's root key. `text` and `secret` never show in `repr`."""

    text: str = field(repr=False)
    slug: str
    routers: tuple[str, ...]
    pin: str
    secret: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises AgentError `join_key_malformed` or `join_key_version`, exit 78; the message never contains the key."""
        text = text.strip()
        try:
            return cls(text, *_parts(text))
        except ValueError as error:
            raise AgentError(
                "join_key_malformed",
                f"the join key is malformed: {error}",
                hint="copy the whole key, one line that starts with xjk_",
                exit_code=Exit.CONFIG,
            ) from None

    @staticmethod
    def make(slug: str, routers: tuple[str, ...], pin: str, secret: bytes) -> "JoinKey":
        """Raises ValueError when a part would not parse."""
        payload = {"v": VERSION, "routers": list(routers), "pin": pin, "secret": b64u(secret)}
        text = f"xjk_{slug}_{b64u(json.dumps(payload, separators=(',', ':')).encode())}"
        return JoinKey(text, *_parts(text))


def _parts(text: str) -> tuple[str, tuple[str, ...], str, bytes]:
    if len(text) > MAX_BYTES:
        raise JoseError(f"{len(text)} characters, over {MAX_BYTES}")
    prefix, _, rest = text.partition("_")
    slug, separator, payload = rest.partition("_")
    if prefix != "xjk" or not separator:
        raise JoseError("it does not have the form xjk_<slug>_<payload>")
    if not _SLUG.fullmatch(slug):
        raise JoseError("its second part is not 1 to 63 characters of a-z, 0-9 and -")
    try:
        members = json_object(unb64u(payload))
    except JoseError as error:
        raise JoseError(f"its last part is incomplete or was changed ({error})") from None
    version = members.get("v")
    if type(version) is not int:
        raise JoseError("`v` is missing")
    if version != VERSION:
        raise AgentError(
            "join_key_version",
            f"the join key has version {version}; this agent knows version {VERSION}: it needs a newer agent",
            hint="install a newer agent",
            exit_code=Exit.CONFIG,
        )
    routers = members.get("routers")
    if not isinstance(routers, list) or not 1 <= len(routers) <= 32:
        raise JoseError("`routers` is not a list of 1 to 32 URLs")
    try:
        unb64u(members.get("pin"), 32)
        secret = unb64u(members.get("secret"), 32)
    except JoseError as error:
        raise JoseError(f"`pin` or `secret`: {error}") from None
    return slug, tuple(dict.fromkeys(router_url(url) for url in routers)), members["pin"], secret
