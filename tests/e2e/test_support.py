"""`requests`, `support-bundle` and the form of `status` of the executable; no text of a client in its log."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.scripted import Scripted, serving
from fakes.stack import until

pytestmark = pytest.mark.e2e

PROMPT = "a prompt that nobody may read"
FORM = Path(__file__).parent.parent / "tree" / "status_schema.txt"


class Traced(Scripted):
    def env(self, **more: str) -> dict[str, str]:
        return super().env(**({"XEROTIER_AGENT_LOG_LEVEL": "trace"} | more))


@pytest.fixture
def stack(agent_exe: Path, tmp_path: Path) -> Iterator[Traced]:
    with serving(Traced, agent_exe, tmp_path) as stack:
        yield stack


def names(value: Any, name: str = "") -> Iterator[str]:
    """As in the file that holds the form."""
    if isinstance(value, dict):
        for member, inner in value.items():
            yield from names(inner, f"{name}.{member}" if name else member)
    elif isinstance(value, list):
        for inner in value:
            yield from names(inner, f"{name}[]")
    else:
        yield name


def test_an_operator_hands_it_to_support(stack: Traced, tmp_path: Path) -> None:
    status = json.loads(stack.cli("status", "--json"))
    known = {line.partition(": ")[0]: line for line in FORM.read_text().splitlines()}
    free = ("config.", "work.sender.ended.", "identity.failures.", "mesh.failures.", "cache.tiers.", "cache.evict")
    strange = [n for n in names(status) if n not in known and not n.startswith(free)]
    assert [n for n in strange if not any(k.startswith((f"{n}.", f"{n}[]")) for k in known)] == []
    assert any(c["what"] == "engine" and c["after"] == "ready" for c in status["history"])
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 5}
    answer = stack.post("/v1/completions", body)
    assert answer.status_code == 200
    text = answer.json()["choices"][0]["text"]
    request = answer.headers["x-request-id"]
    agent = stack.agent
    assert agent is not None
    until("its line", lambda: '"acknowledged_ms"' in agent.text, 20)
    output = tmp_path / "b.tar.gz"
    assert stack.cli("support-bundle", "--output", str(output)) == str(output)
    with tarfile.open(output) as tar:
        found = {Path(m.name).name: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]
    assert json.loads(found["status.json"])["agent"]["pid"] == status["agent"]["pid"]
    assert request in found["log-agent.jsonl"]
    assert found["log-engine.jsonl"].strip()
    assert json.loads(found["about.json"])["problems"] == {}
    assert [plan["model"]["task"] for plan in json.loads(found["plan.json"]).values()] == ["generate"]
    line = next(json.loads(t) for t in agent.text.splitlines() if '"acknowledged_ms"' in t)
    assert (line["request"], line["lease"] > 0) == (request, True)
    everything = agent.text + str(found)
    assert PROMPT not in everything
    assert len(text) > 4
    assert text not in everything
    payload = stack.join_key.split("_")[2]
    state = json.loads((stack.config / "enrollment.json").read_bytes())
    for secret in (payload, state["key"], state["enrollment"]["token"], state["enrollment"]["current"]):
        assert secret not in str(found)
