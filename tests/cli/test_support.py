"""`support-bundle`: what is in it, with and without an agent, and that a secret of no kind gets out in it."""

import base64
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from xim_agent import leaks, log
from xim_agent.cache import claim
from xim_agent.cli import common
from xim_agent.cli.support_bundle import write
from xim_agent.cli.support_collect import Collected, checked
from xim_agent.config.fields import Config
from xim_agent.control.server import ControlServer
from xim_agent.errors import AgentError

SECRETS = {
    "join key": "xjk_p_payload0123456789abc",
    "refresh token": "xrt_0123456789abcdef",
    "XEM token": "eyJhbGciOiJFZERTQSJ9.eyJzdWIi.c2lnLUE",
    "private key": "q0123456789-private_KEY-0123456789abcdefghi",
    "salt secret": "salt/secret+0123456789",
    "proxy password": "pröxy pass:word 0123",
    "value of a secret argument or variable": 'hf_"quoted"\\0123456789',
}
FORMS: dict[str, Any] = {
    "plain": str,
    "url": lambda s: quote(s, safe=""),
    "every byte": lambda s: "".join(f"%{b:02x}" for b in s.encode()),
    "hex": lambda s: s.encode().hex().upper(),
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64url": lambda s: base64.urlsafe_b64encode(s.encode()).decode().rstrip("="),
    "basic": lambda s: base64.b64encode(f"user:{s}".encode()).decode(),
    "wrapped": lambda s: re.sub(r"(.{7})", r"\1\n", base64.b64encode(f"ab{s}c".encode()).decode()),
}
MEMBERS = ("status.json", "requests.json", "log-agent.jsonl", "log-engine.jsonl", "configuration.json", "doctor.json")


@pytest.mark.parametrize("form", FORMS)
def test_each_kind_is_found_in_each_form(form: str) -> None:
    known = {value: kind for kind, value in SECRETS.items()}
    for kind, value in SECRETS.items():
        text = json.dumps({"a": f"before {FORMS[form](value)} after"}, ensure_ascii=False)
        if form == "plain" and json.dumps(value, ensure_ascii=False)[1:-1] != value:
            continue  # as JSON it is `redact` that knows it
        assert leaks.find({"m": text, "n": "nothing"}, known) == [("m", kind)]


@given(st.binary(max_size=9), st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=6), st.binary())
def test_base64_is_found_wherever_it_begins(before: bytes, secret: str, after: bytes) -> None:
    text = base64.b64encode(before + secret.encode() + after).decode()
    assert leaks.find({"m": text}, {secret: "k"})


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_planted_is_taken_out_or_refused(member: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_planted", set())
    monkeypatch.setattr(log, "_kinds", {})
    for kind, value in SECRETS.items():
        log.hide(value, kind=kind)
    for kind, value in SECRETS.items():
        found = Collected()
        found.add("about.json", {"well": 1})
        found.add(member, {"text": f"x {FORMS[form](value)} y"})
        if leaks.find(found.members, log.hidden()):
            with pytest.raises(AgentError) as refused:
                checked(found)
            error = refused.value
            assert (error.code, error.exit_code) == ("secret_found", 3)
            assert f"{kind} in {member}" in error.message
            assert value not in error.message + error.hint
        else:
            assert "***" in checked(found)[member], "it was known in this form, and taken out"


def test_what_the_agent_found_in_its_own_is_refused_too_and_a_pem_always() -> None:
    with pytest.raises(AgentError, match=r"XEM token in log-agent\.jsonl"):
        checked(Collected(members={"a": "b"}, leaks=[("log-agent.jsonl", "XEM token")]))
    with pytest.raises(AgentError, match="private key in PEM in a"):
        checked(Collected(members={"a": "-----BEGIN EC PRIVATE KEY-----\\nMHc"}))


def test_the_file_is_ours_alone_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    write(path, {"status.json": "{}"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path) as tar:
        assert [Path(name).name for name in tar.getnames()] == ["status.json"]
    before = path.read_bytes()
    for place in (path, tmp_path / "none" / "b.tar.gz"):
        with pytest.raises(AgentError) as error:
            write(place, {"a": "b"})
        assert (error.value.code, error.value.exit_code) == ("bundle_write", 77)
    assert path.read_bytes() == before


def test_kinds_of_what_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_planted", set())
    monkeypatch.setattr(log, "_kinds", {})
    monkeypatch.setattr(log, "setup", lambda *_: None)
    monkeypatch.setattr("xim_agent.cli.private.keep_private", lambda *_: None)
    given = {"JOIN_KEY": SECRETS["join key"], "VLLM_SALT_SECRET": "salt-0123", "VLLM_ARGS": "--api-key api-0123",
             "VLLM_ENV": "HF_TOKEN=hub-0123"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(f"XEROTIER_AGENT_{name}", value)
    monkeypatch.setenv("https_proxy", "http://user:proxy-0123@p:1")
    assert isinstance(common.configured({}), Config)
    found = log.hidden()
    assert (found[SECRETS["join key"]], found["salt-0123"]) == ("join key", "salt secret")
    assert (found["proxy-0123"], found["api-0123"], found["hub-0123"]) == (
        "proxy password", *["value of a secret argument or variable"] * 2,
    )  # fmt: skip


class Place:
    def __init__(self, root: Path) -> None:
        self.root, self.cache, self.socket, self.output = root, root / "cache", root / "c.sock", root / "out.tar.gz"

    async def bundle(self, **env: str) -> subprocess.CompletedProcess[bytes]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("XEROTIER_")}
        own = {"XEROTIER_AGENT_MODEL_CACHE_PATH": str(self.cache), "HOME": str(self.root),
               "XEROTIER_AGENT_CONFIG_PATH": str(self.root / "state"), "PATH": "/nonexistent"}  # fmt: skip
        command = [sys.executable, "-m", "xim_agent", "support-bundle", "--output", str(self.output)]
        with trio.fail_after(90):
            return await trio.run_process(
                command, env=kept | own | env, capture_stdout=True, capture_stderr=True, check=False
            )

    def members(self) -> dict[str, str]:
        with tarfile.open(self.output) as tar:
            return {Path(m.name).name: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]


async def test_with_an_agent_all_of_it_and_with_a_secret_in_its_answer_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.cache.mkdir()
    logs: dict[str, Any] = {"agent": ['{"message": "m"}'], "engine": ["e salt-0123456789"], "leaks": []}

    async def answer(arguments: Any, report: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return {"schema": 1}

    async def tell(arguments: Any, report: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return logs

    def announce(says: str) -> None:
        (place.cache / claim.LOCK).write_text(f"4711\n{says}\n")

    calls = {"status": answer, "requests": answer, "logs": tell, "cache/ls": answer}
    salt = {"XEROTIER_AGENT_VLLM_SALT_SECRET": "salt-0123456789"}
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(place.socket, calls, announce).run)
        done = await place.bundle(**salt)
        assert (done.returncode, done.stdout) == (0, f"{place.output}\n".encode()), done.stderr
        found = place.members()
        assert {"status.json", "requests.json", "log-agent.jsonl", "log-engine.jsonl", "doctor.json", "versions.json",
                "configuration.json", "hardware.json", "environment.json", "about.json"} <= found.keys()  # fmt: skip
        assert found["log-engine.jsonl"] == "e ***\n"
        assert json.loads(found["configuration.json"])["vllm_salt_secret"] == "***"
        assert "salt-0123456789" not in str(found)
        place.output.unlink()
        announce(str(place.socket))  # without an agent's lock, `cache/ls` took it
        logs["engine"] = [base64.b64encode(b"my salt-0123456789").decode()]
        done = await place.bundle(**salt)
        assert (done.returncode, done.stdout) == (3, b""), (done.stderr, place.members())
        assert b"salt secret in log-engine.jsonl" in done.stderr
        assert not place.output.exists()
        nursery.cancel_scope.cancel()


async def test_without_an_agent_and_with_a_wrong_setting_it_tells_what_it_can(tmp_path: Path) -> None:
    place = Place(tmp_path)
    done = await place.bundle()
    assert done.returncode == 0, done.stderr
    assert b"without agent: no agent has ever used" in done.stderr
    found = place.members()
    assert "agent_absent" in json.loads(found["about.json"])["problems"]["agent"]
    assert {"doctor.json", "hardware.json", "cache.json"} <= found.keys()
    place.output.unlink()
    done = await place.bundle(XEROTIER_AGENT_METRICS_PORT="many", XEROTIER_AGENT_JOIN_KEY=SECRETS["join key"])
    assert done.returncode == 0, done.stderr
    assert json.loads(place.members()["doctor.json"])["checks"][0]["status"] == "failure"
    assert "payload0123456789abc" not in str(place.members())
