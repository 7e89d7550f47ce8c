"""Every option that means something on a CPU, given to real vLLM and read back from it; `fakes/real_options.py`."""

import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import CPU_HOST, alive, assignment, shm, until
from fakes.real_options import PLAIN, STARTS, Row
from fakes.real_vllm import (
    JSON,
    api_server,
    counters,
    environment,
    launcher,
    logged_arguments,
    noted,
    post,
    ready,
    real_service,
    repeating,
    server_info,
    workers,
)

from xim_agent.assignment.plan import EngineTarget
from xim_agent.config.sources import load
from xim_agent.engine.client import EngineLost
from xim_agent.engine.guard import Guard
from xim_agent.engine.launcher import version
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import descendants

pytestmark = [pytest.mark.engine, pytest.mark.full]

PREFIX = "XEROTIER_AGENT_"
# For float32, where no near tie is decided by the shape of a batch.
ASKED = {
    "model": "m", "prompt": "The router keeps the frame, the router", "max_tokens": 200, "temperature": 0,
    "ignore_eos": True,
}  # fmt: skip
LONG = {"model": "m", "prompt": "A worker asks the router for work. " * 40, "max_tokens": 1}


@dataclass(frozen=True)
class Bench:
    """`toy`: of the places that words may name; `model`: what is served; `cores`: what a cgroup leaves."""

    guard: Guard
    runtime: Path
    toy: Path
    model: Path
    launcher: str
    nursery: trio.Nursery
    logs: pytest.LogCaptureFixture
    cores: float = 2.0

    @property
    def places(self) -> dict[str, str]:
        found = {"runtime": self.runtime, "toy": self.toy, "launcher": self.launcher}
        return {name: str(path) for name, path in found.items()} | {"version": version(Path(self.launcher))}

    async def start(self, rows: list[Row], runtime: Path) -> EngineService:
        """Ready, and it has told what `rows` expect. `runtime`: another one each time."""
        places = self.places | {"runtime": str(runtime)}
        hardware = replace(CPU_HOST, cpu_limit=self.cores)
        service = real_service(load({}, variables(rows, places)), self.guard, runtime, hardware)
        self.nursery.start_soon(service.run)
        self.logs.clear()
        with self.logs.at_level(logging.INFO, "xim_agent.engine.vllm"):
            await service.switch(EngineTarget(assignment(**serving(rows, places)), self.model))
            await ready(service)
        answers = await told(service, self.guard, self.logs.records)
        seen = [(option, word, {path: look(answers, path) for path in expected}) for option, word, expected in rows]
        assert seen == [(option, word, filled(expected, places)) for option, word, expected in rows]
        return service

    async def stop(self, service: EngineService) -> None:
        """Nothing of it is left."""
        await until(lambda: any(name.startswith("psm_") for name in noted(service)))
        files = noted(service)
        assert files <= shm()
        await service.stop()
        assert descendants(self.guard.pid) == []
        assert not files & shm()


@pytest.fixture
def bench(
    guard: Guard,
    runtime: Path,
    toy_model: Path,
    vllm_launcher: str,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> Bench:
    return Bench(guard, runtime, toy_model, toy_model, vllm_launcher, nursery, caplog)


async def nothing_more(bench: Bench, service: EngineService) -> None:
    """Ready is: it has answered."""


async def tenants_are_kept_apart(bench: Bench, service: EngineService) -> None:
    """Nobody learns from the time or the bill of a request what another tenant has asked."""
    assert len(workers(bench.guard)) == 2

    async def cached(tenant: str) -> int:
        usage = (await post(service, "/v1/completions", LONG, tenant))["usage"]
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    assert await cached("one") == 0
    assert await cached("one") > 100
    assert await cached("two") == 0


async def speculation_changes_no_answer(bench: Bench, service: EngineService) -> None:
    with_it = await post(service, "/v1/completions", ASKED)
    counted = await counters(service, "vllm:spec_decode_num_")
    print(bench.model.name, counted)
    assert 0 < counted["accepted_tokens_total"] <= counted["draft_tokens_total"]
    assert 0 < counted["drafts_total"] < ASKED["max_tokens"]
    await bench.stop(service)
    plain = await bench.start(PLAIN, bench.runtime / "plain")
    without = await post(plain, "/v1/completions", ASKED)
    assert await counters(plain, "vllm:spec_decode_num_") == {}
    assert (with_it["choices"], with_it["usage"]) == (without["choices"], without["usage"])
    assert with_it["usage"]["completion_tokens"] == ASKED["max_tokens"]
    await bench.stop(plain)


async def it_embeds(bench: Bench, service: EngineService) -> None:
    answer = await post(service, "/v1/embeddings", {"model": "m", "input": "The router"})
    assert len(answer["data"][0]["embedding"]) == 128


MORE: dict[str, Callable[[Bench, EngineService], Awaitable[None]]] = {
    "two ranks": tenants_are_kept_apart,
    "ngram": speculation_changes_no_answer,
    "draft model": speculation_changes_no_answer,
    "unsized": it_embeds,
}


@pytest.mark.parametrize("name", STARTS)
async def test_options_reach_real_vllm(name: str, bench: Bench) -> None:
    if name == "ngram":
        bench = replace(bench, model=repeating(bench.toy, bench.runtime / "model"))
    if name.endswith("a quota of one core"):
        bench = replace(bench, cores=1.0)
    service = await bench.start(STARTS[name], bench.runtime)
    await MORE.get(name, nothing_more)(bench, service)
    if service.ready:
        await bench.stop(service)


async def test_a_rank_that_dies_takes_all_with_it_and_comes_back(bench: Bench, error_logs: list[Any]) -> None:
    service = await bench.start(STARTS["two ranks"], bench.runtime)
    before = await post(service, "/v1/completions", ASKED)
    await until(lambda: any(name.startswith("psm_") for name in noted(service)))
    files, tree = noted(service), [process.pid for process in descendants(bench.guard.pid)]

    async def strike() -> None:
        await until(lambda: service.client.active == 1)
        os.kill(workers(bench.guard)[1], signal.SIGKILL)

    bench.nursery.start_soon(strike)
    with trio.fail_after(30):
        await broken_off(service, {**ASKED, "max_tokens": 900})
    await until(lambda: not any(map(alive, tree)), 10)
    await until(lambda: not files & shm(), 1)
    await until(lambda: service.statistics().failures == 1)
    assert service.statistics().failure == "engine_killed"
    await ready(service)
    after = await post(service, "/v1/completions", ASKED)
    assert before["choices"] == after["choices"]
    await bench.stop(service)


async def broken_off(service: EngineService, body: dict[str, Any]) -> None:
    """A request whose engine dies: vLLM says so, or its connection ends."""
    with suppress(EngineLost):
        async with service.client.open("/v1/completions", JSON, json.dumps(body).encode()) as reply:
            said = b"".join([chunk async for chunk in reply.chunks()])
        assert (reply.status, b"EngineCore encountered" in said) == (500, True)


def filled(value: Any, places: Mapping[str, str]) -> Any:
    """With the places in its texts that name some."""
    if isinstance(value, dict):
        return {name: filled(inner, places) for name, inner in value.items()}
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(f"{{{name}}}", place)
    return value


def variables(rows: list[Row], places: Mapping[str, str]) -> dict[str, str]:
    given = {PREFIX + option: filled(word, places) for option, word, _ in rows if option.isupper()}
    return {"HOME": places["runtime"], **given}


def serving(rows: list[Row], places: Mapping[str, str]) -> dict[str, Any]:
    words = [w for option, word, _ in rows if option.startswith("--") for w in (option, filled(word, places)) if w]
    fields: dict[str, Any] = {option: word for option, word, _ in rows if option.isidentifier() and option.islower()}
    if "max_model_len" in fields:
        fields["max_model_len"] = int(fields["max_model_len"])
    return {**fields, "engine_args": tuple(words)}


async def told(service: EngineService, guard: Guard, records: list[logging.LogRecord]) -> dict[str, Any]:
    info = await server_info(service)
    server = api_server(guard)
    return {
        "vllm": info["vllm_config"],
        "vllm_env": info["vllm_env"],
        "args": logged_arguments(records),
        "env": environment(server),
        "worker": {"cpus": [os.sched_getaffinity(pid) for pid in workers(guard)]},
        "agent": {"ceiling": service.ceiling, "launcher": launcher(server)},
    }


def look(answers: Any, path: str) -> Any:
    """What is found there; None where nothing is."""
    for name in path.split("."):
        answers = (answers or {}).get(name)
    return answers
