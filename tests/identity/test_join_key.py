import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.errors import AgentError
from xim_agent.identity.join_key import JoinKey, parse_router_url
from xim_agent.identity.jose import b64u
from xim_agent.log import redact

PIN = b64u(b"p" * 32)
SECRET = b"s" * 32


def text(**changes: Any) -> str:
    payload = {"v": 1, "routers": ["https://r.example:8443"], "pin": PIN, "secret": b64u(SECRET), **changes}
    return "xjk_demo_" + b64u(json.dumps(payload).encode())


@given(
    st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True),
    st.lists(st.sampled_from(["https://a.example", "http://127.0.0.1:8080", "https://[::1]:1"]), min_size=1),
    st.binary(min_size=32, max_size=32),
)
def test_what_is_made_parses_to_the_same(slug: str, routers: list[str], secret: bytes) -> None:
    made = JoinKey.make(slug, tuple(dict.fromkeys(routers)), PIN, secret)
    assert JoinKey.parse(f" {made.text}\n") == made
    assert made.secret == secret


def test_repr_and_errors_keep_the_secret() -> None:
    key = JoinKey.parse(text(unknown=1))
    assert b64u(SECRET) not in repr(key)
    assert key.text not in repr(key)
    with pytest.raises(AgentError) as caught:
        JoinKey.parse(text(pin="x"))
    assert b64u(SECRET) not in caught.value.message


@pytest.mark.parametrize(
    "url", ["ftp://user:hunter222@r.example", "user:hunter222@r.example", "https://a:hunter222@b:x"]
)
def test_password_in_a_router_url_is_refused_unseen(url: str) -> None:
    with pytest.raises(AgentError) as caught:
        parse_router_url(url)
    assert (caught.value.code, caught.value.exit_code) == ("router_url_malformed", 78)
    assert "hunter222" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "xjk_demo",
        "xjk__e30",
        "xjk_Demo_e30",
        "xjk_demo_e30=",
        "xjk_demo_!!",
        "yjk_demo_e30",
        "xjk_demo_" + b64u(b"[]"),
        "xjk_demo_" + b64u(b'{"v":1,"v":1}'),
        text(v=None),
        text(v=True),
        text(routers=[]),
        text(routers="https://r.example"),
        text(routers=["ftp://r.example"]),
        text(routers=["https://"]),
        text(routers=["https://u:p@r.example"]),
        text(routers=["https://r.example?x=1"]),
        text(routers=["https://r.example:99999"]),
        text(routers=[1]),
        text(pin=b64u(b"short")),
        text(secret=b64u(b"short")),
        text(secret=None),
        text(pad="x" * 9000),
    ],
)
def test_malformed_key_is_exit_78(bad: str) -> None:
    with pytest.raises(AgentError) as caught:
        JoinKey.parse(bad)
    assert (caught.value.code, caught.value.exit_code) == ("join_key_malformed", 78)


def test_what_the_key_should_look_like_is_not_cut_out_of_the_log() -> None:
    with pytest.raises(AgentError) as caught:
        JoinKey.parse("xjk")
    assert "xjk_<slug>_<payload>" in redact(caught.value.message)


def test_another_version_needs_a_newer_agent() -> None:
    with pytest.raises(AgentError, match="needs a newer agent"):
        JoinKey.parse(text(v=2))


@given(st.text(max_size=300) | st.text(max_size=200).map(lambda t: "xjk_demo_" + t))
def test_any_text_is_refused_by_name(value: str) -> None:
    with pytest.raises(AgentError):
        JoinKey.parse(value)


def test_router_url_setting() -> None:
    assert parse_router_url(" https://r.example/ ") == "https://r.example"
    with pytest.raises(AgentError) as caught:
        parse_router_url("r.example")
    assert caught.value.exit_code == 78
