import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import Bench, alive, shm, until

from xim_agent.engine import planner, state
from xim_agent.engine.client import EngineLost, connect
from xim_agent.engine.service import EngineService
from xim_agent.engine.state import EngineState
from xim_agent.engine.tree import descendants
from xim_agent.errors import AgentError


async def chat(service: EngineService, **fields: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    async with service.client.open(
        "/v1/chat/completions", {"content-type": "application/json"}, json.dumps(body).encode()
    ) as reply:
        assert reply.status == 200
        return b"".join([chunk async for chunk in reply.chunks()])


async def begin(service: EngineService, nursery: trio.Nursery, bench: Bench, **serving: Any) -> None:
    nursery.start_soon(service.run)
    with trio.fail_after(20):
        await service.switch(bench.target(**serving))


async def ready(service: EngineService) -> None:
    with trio.fail_after(20):
        await service.wait_ready()


def below(bench: Bench) -> list[int]:
    return [p.pid for p in descendants(bench.guard.pid)]


async def test_an_answer_and_a_clean_stop(bench: Bench, running: EngineService) -> None:
    answer = await chat(running, max_tokens=3)
    assert answer.count(b'"content": "') == 4
    assert answer.endswith(b"data: [DONE]\n\n")
    assert running.ceiling == 32, "65536 tokens, as it says itself, hold 32 typical sequences of 2048"
    assert running.statistics().state == "ready"
    assert os.sched_getscheduler(bench.starts[0]) == os.SCHED_BATCH, "on a CPU it gives way"
    await until(lambda: b"vllm:iteration_tokens_total_count" in running.metrics_text())
    await running.stop()
    assert running.state is EngineState.STOPPED
    assert below(bench) == []
    assert not (bench.runtime / "engine.sock").exists()
    assert running.metrics_text() == b""
    with pytest.raises(EngineLost):
        await chat(running)


async def test_its_environment_has_nothing_of_ours(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XEROTIER_AGENT_JOIN_KEY", "xjk_secret")
    monkeypatch.setenv("OPERATORS_OWN", "kept")
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    async with connect(str(bench.runtime / "engine.sock")) as http:
        env = (await http.get("/fake")).json()["env"]
    assert env["OPERATORS_OWN"] == "kept"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert not [name for name in env if name.startswith("XEROTIER_AGENT_")]
    assert os.getsid(bench.starts[0]) == bench.starts[0], "its own session"
    await service.stop()


async def test_chatter_never_blocks_it_and_a_stale_socket_is_removed(bench: Bench, nursery: trio.Nursery) -> None:
    bench.env["FAKE_VLLM_CHATTER"] = "1000000"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(bench.runtime / "engine.sock"))
    stale.close()
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    await service.stop()


async def test_crashing_starts_are_retried_and_named(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    bench.env |= {
        "FAKE_VLLM_EXIT": "3",
        "FAKE_VLLM_EXIT_FIRST": "2",
        "FAKE_VLLM_STDERR": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    }
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: bool(bench.health.conditions()))
    condition = bench.health.conditions()[0]
    assert condition.code == "engine_failed"
    assert "CUDA out of memory" in condition.text
    assert "GPU_MEMORY_UTILIZATION" in bench.health.hints["engine_failed"]
    await ready(service)
    assert len(bench.starts) == 3
    assert not bench.health.conditions()
    assert [r.error_class for r in error_logs] == ["gpu_out_of_memory"] * 2
    await service.stop()


@pytest.mark.parametrize(
    ("words", "whole"), [("Fatal Python error: Aborted", True), ("torch.OutOfMemoryError: CUDA out of memory", False)]
)
async def test_all_it_wrote_is_logged_where_the_remedy_is_not_enough(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any], words: str, whole: bool
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    bench.env |= {"FAKE_VLLM_EXIT": "1", "FAKE_VLLM_EXIT_FIRST": "1", "FAKE_VLLM_STDERR": f"{words}\n\n  File x in y"}
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    (record,) = error_logs
    assert words in record.getMessage()
    assert ("File x in y" in record.getMessage()) == whole
    await service.stop()


async def test_five_failures_in_ten_minutes_are_degraded(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.01)
    bench.env |= {"FAKE_VLLM_EXIT": "1"}
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: service.degraded)
    assert service.state is EngineState.FAILED
    assert len(bench.starts) == 5
    assert error_logs[-1].next_start_seconds == 300.0
    with trio.fail_after(5):
        await service.stop()
    assert not service.degraded


async def killed_in_a_stream(service: EngineService, kill: Callable[[], None]) -> None:
    """The answer under way ends with EngineLost, at once."""

    async def strike() -> None:
        await until(lambda: service.client.active == 1)
        kill()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(strike)
        with trio.fail_after(5), pytest.raises(EngineLost):
            await chat(service, max_tokens=1000, fake={"delay": 0.01})


async def test_api_server_killed_in_a_stream(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    bench.env |= {"FAKE_VLLM_CORE": "1", "FAKE_VLLM_SHM": "1"}
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    old = below(bench)
    assert len(old) == 2
    notes = bench.runtime / "leftovers.json"
    await until(lambda: "psm_" in notes.read_text())
    noted = json.loads(notes.read_text())["shm"]
    neighbours = Path("/dev/shm") / f"psm_neighbour{os.getpid()}"
    neighbours.write_bytes(b"x")
    try:
        await killed_in_a_stream(service, lambda: os.kill(bench.starts[0], signal.SIGKILL))
        await until(lambda: not any(map(alive, old)), 5)
        await ready(service)
        assert neighbours.exists()
    finally:
        neighbours.unlink()
    assert not set(noted) & shm()
    assert (await chat(service, max_tokens=1)).endswith(b"[DONE]\n\n")
    assert service.statistics().failures == 1
    await service.stop()
    assert below(bench) == []


async def test_a_hang_with_health_200_is_found_and_cured(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    bench.settings["engine_hang_seconds"] = 1.5
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    with trio.fail_after(15):
        await killed_in_a_stream_by_hang(service, bench)
    bench.say("")
    await ready(service)
    assert "made no step" in error_logs[0].getMessage()
    assert len(bench.starts) == 2
    await service.stop()


async def killed_in_a_stream_by_hang(service: EngineService, bench: Bench) -> None:
    async with trio.open_nursery() as nursery:

        async def hang() -> None:
            await until(lambda: service.client.active == 1)
            bench.say("hang")

        nursery.start_soon(hang)
        with pytest.raises(EngineLost):
            await chat(service, max_tokens=1000, fake={"delay": 0.01})


async def test_health_that_says_no_is_death(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    bench.say("sick")
    await until(lambda: bool(error_logs))
    bench.say("")
    await ready(service)
    assert "engine core has died" in error_logs[0].getMessage()
    await service.stop()


async def test_a_start_without_output_and_cpu_time_has_stalled(
    bench: Bench, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    bench.settings["engine_start_stall_seconds"] = 1.0
    bench.env |= {"FAKE_VLLM_START_SECONDS": "60", "FAKE_VLLM_START_SILENT": "1"}
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: bool(error_logs))
    assert "neither written nor computed" in error_logs[0].getMessage()
    assert below(bench) == []
    await service.stop()


async def test_a_slow_start_that_writes_is_waited_for(bench: Bench, nursery: trio.Nursery) -> None:
    bench.settings["engine_start_stall_seconds"] = 1.0
    bench.env |= {"FAKE_VLLM_START_SECONDS": "3"}
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: service.progress is not None and service.progress.text == "loading weights")
    await ready(service)
    assert service.progress is None
    await service.stop()


async def test_stopped_while_it_starts_and_ignores_sigterm(bench: Bench, nursery: trio.Nursery) -> None:
    bench.env |= {"FAKE_VLLM_START_SECONDS": "60", "FAKE_VLLM_START_IGNORES_TERM": "1", "FAKE_VLLM_CORE": "1"}
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: len(below(bench)) == 2)
    with trio.fail_after(5):
        await service.stop()
    assert below(bench) == []
    assert service.state is EngineState.STOPPED


async def test_health_without_a_token_is_not_ready(bench: Bench, nursery: trio.Nursery, error_logs: list[Any]) -> None:
    bench.env |= {"FAKE_VLLM_PROMPT_FAILS": "500"}
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: bool(error_logs))
    assert "cannot serve" in error_logs[0].getMessage()
    assert service.statistics().seconds_to_ready is None
    await service.stop()


@pytest.mark.parametrize("task", ["embed", "score"])
async def test_other_tasks_are_proven_their_own_way(bench: Bench, nursery: trio.Nursery, task: str) -> None:
    service = bench.service()
    await begin(service, nursery, bench, task=task)
    await ready(service)
    await service.stop()


async def test_the_same_engine_is_not_restarted_another_is(bench: Bench, running: EngineService) -> None:
    await running.switch(bench.target())
    assert running.ready
    assert len(bench.starts) == 1
    await running.switch(bench.target(max_model_len=1024))
    await ready(running)
    assert len(bench.starts) == 2
    assert not alive(bench.starts[0])


async def test_a_target_that_cannot_be_served_leaves_what_runs_alone(bench: Bench, running: EngineService) -> None:
    with pytest.raises(AgentError) as refused:
        await running.switch(bench.target(engine_args=("--trust-remote-code",)))
    assert refused.value.code == "engine_args_refused"
    assert running.ready
    assert len(bench.starts) == 1


async def test_a_flag_that_this_version_lacks_is_learnt_and_left_out(
    bench: Bench, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    bench.env["FAKE_VLLM_LACKS"] = "--disable-uvicorn-access-log"
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    assert "does not know --disable-uvicorn-access-log, left out" in caplog.text
    assert json.loads((bench.runtime / "flags.json").read_text())["flags"]
    await service.stop()
    with trio.fail_after(20):
        await service.switch(bench.target())
        await service.wait_ready()
    assert service.statistics().starts == 3, "the second time it is known before"
    await service.stop()


async def test_a_needed_flag_that_is_missing_stops_the_start_by_name(
    bench: Bench, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    bench.env["FAKE_VLLM_LACKS"] = "--allowed-media-domains"
    service = bench.service()
    await begin(service, nursery, bench)
    await until(lambda: bool(error_logs))
    assert "does not know --allowed-media-domains" in error_logs[0].getMessage()
    assert service.degraded
    await service.stop()


async def test_two_agents_never_share_a_runtime_directory(
    bench: Bench, running: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "LOCK_SECONDS", 0.2)
    with pytest.raises(AgentError) as second:
        await bench.service().run()
    assert second.value.code == "runtime_directory_in_use"
    assert running.ready


def saying(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 2}


async def crash_with(service: EngineService, nursery: trio.Nursery, bench: Bench, *prompts: str) -> None:
    """The engine dies while it works on these requests, and is ready again."""
    starts = len(bench.starts)
    lost: list[str] = []

    async def ask(prompt: str) -> None:
        with pytest.raises(EngineLost):
            await chat(service, **saying(prompt))
        lost.append(prompt)

    bench.say("hang")
    await trio.sleep(0.2)  # the fake looks every 50 ms
    for prompt in prompts:
        nursery.start_soon(ask, prompt)
    await until(lambda: service.client.active == len(prompts))
    os.kill(bench.starts[-1], signal.SIGKILL)
    bench.say("")
    await until(lambda: len(bench.starts) == starts + 1 and len(lost) == len(prompts))
    await ready(service)


async def test_a_request_that_ran_at_two_crashes_in_a_row_is_refused(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any]
) -> None:
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    service = bench.service()
    await begin(service, nursery, bench)
    await ready(service)
    await crash_with(service, nursery, bench, "poison", "other", "answered")
    assert (await chat(service, **saying("answered"))).endswith(b"[DONE]\n\n")
    await crash_with(service, nursery, bench, "poison", "third", "answered")
    with pytest.raises(AgentError) as refused:
        await chat(service, **saying("poison"))
    assert refused.value.code == "poison_request"
    for prompt in ("other", "third", "answered"):
        assert (await chat(service, **saying(prompt))).endswith(b"[DONE]\n\n")
    await service.switch(bench.target(max_model_len=1024))
    await ready(service)
    assert (await chat(service, **saying("poison"))).endswith(b"[DONE]\n\n"), "another engine may bear it"
    await service.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_the_core_broke_off_counts_as_running_at_the_crash(
    bench: Bench, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, error_logs: list[Any], stream: bool
) -> None:
    """vLLM's API server ends its answers in order before it goes down with its core."""
    monkeypatch.setattr(state, "FIRST_DELAY", 0.05)
    service = bench.service()
    await begin(service, nursery, bench)
    body = json.dumps({"model": "m", "prompt": "hi", "stream": stream, "fake": {"error_after": 1}}).encode()
    for start in (1, 2):
        await ready(service)
        with suppress(AgentError):
            async with service.client.open("/v1/completions", {}, body) as reply:
                answer = b"".join([chunk async for chunk in reply.chunks()])
                assert b"EngineCore encountered" in answer
                if stream:  # as work/request.py finds it
                    raise AgentError("engine_lost", "the engine broke off")
        assert service.client.active == 0
        os.kill(bench.starts[-1], signal.SIGKILL)
        await until(lambda seen=start: len(bench.starts) > seen)  # type: ignore[misc]
    await ready(service)
    with pytest.raises(AgentError) as refused:
        await service.client.open("/v1/completions", {}, body).__aenter__()
    assert refused.value.code == "poison_request"
    await service.stop()
