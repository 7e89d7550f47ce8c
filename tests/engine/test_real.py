"""The same service over real vLLM on a CPU."""

import json
import os
import re
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from fakes.engine import CPU_HOST, alive, assignment, shm, until
from fakes.real_vllm import api_server, ready, real_service, server_info

from xim_agent.assignment.plan import EngineTarget
from xim_agent.config.fields import Config
from xim_agent.engine.arguments import value_of
from xim_agent.engine.budget import in_flight
from xim_agent.engine.client import EngineLost
from xim_agent.engine.command import Places, plan
from xim_agent.engine.facts import ModelFacts
from xim_agent.engine.guard import Guard
from xim_agent.engine.service import EngineService
from xim_agent.engine.tree import descendants


@pytest.fixture
def service(guard: Guard, runtime: Path, vllm_launcher: str) -> EngineService:
    config = Config(
        vllm_path=vllm_launcher,
        vllm_args=("--enforce-eager",),
        vllm_env=("VLLM_SERVER_DEV_MODE=1",),  # it tells its whole configuration then
        max_num_seqs=8,
        drain_timeout_seconds=5,
        model_cache_path=runtime,
    )
    return real_service(config, guard, runtime)


@pytest.mark.engine
@pytest.mark.full
async def test_real_vllm_serves_dies_and_leaves_nothing(
    service: EngineService, guard: Guard, runtime: Path, toy_model: Path, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    nursery.start_soon(service.run)
    await service.switch(EngineTarget(assignment(), toy_model))
    await ready(service)
    assert service.ceiling == 8
    await reported_numbers(service, toy_model, runtime)
    await no_media_is_fetched(service)
    body = {"model": "m", "prompt": "The router", "max_tokens": 8, "temperature": 0, "stream": True}
    answer = await completion(service, body)
    assert answer.endswith(b"data: [DONE]\n\n")
    await until(lambda: service.load().running == 0)
    tree = [p.pid for p in descendants(guard.pid)]
    server = api_server(guard)
    assert len(tree) >= 3, "API server, EngineCore, worker"
    notes = runtime / "leftovers.json"
    await until(lambda: "psm_" in notes.read_text())
    noted = json.loads(notes.read_text())["shm"]

    async def strike() -> None:
        await until(lambda: service.client.active == 1)
        os.kill(server, signal.SIGKILL)

    nursery.start_soon(strike)
    with trio.fail_after(10), pytest.raises(EngineLost):
        await completion(service, {**body, "max_tokens": 15000, "ignore_eos": True})
    await until(lambda: not any(map(alive, tree)), 10)
    await service.stop()
    assert descendants(guard.pid) == []
    assert not set(noted) & shm()
    assert not (runtime / "engine.sock").exists()


def process_named(guard: Guard, name: str) -> int:
    """Pid of EngineCore or worker, as vLLM calls them."""
    found = [p.pid for p in descendants(guard.pid) if name in Path(f"/proc/{p.pid}/cmdline").read_text()]
    assert len(found) == 1, name
    return found[0]


async def asked_for_ever(service: EngineService, number: int) -> None:
    """One long request after the other; ends with the engine."""
    with suppress(EngineLost):
        while True:
            text = f"The router {number}"
            await completion(service, {"model": "m", "prompt": text, "max_tokens": 4000, "ignore_eos": True})


@pytest.mark.engine
@pytest.mark.full
async def test_a_real_hang_is_cured_a_full_queue_is_not_and_a_dead_worker_leaves_nothing(
    service: EngineService, guard: Guard, runtime: Path, toy_model: Path, nursery: trio.Nursery, error_logs: list[Any]
) -> None:
    nursery.start_soon(service.run)
    await service.switch(EngineTarget(assignment(), toy_model))
    await ready(service)
    for number in range(24):  # three for each place that it has
        nursery.start_soon(asked_for_ever, service, number)
    await until(lambda: (service.load().waiting or 0) >= 8)
    with trio.move_on_after(75):  # longer than a hang may last
        await until(lambda: not service.ready, 100)
    assert service.ready, [record.getMessage() for record in error_logs]
    assert (service.load().waiting or 0) >= 8

    tree = [p.pid for p in descendants(guard.pid)]
    os.kill(process_named(guard, "VLLM::EngineCore"), signal.SIGSTOP)
    stopped = trio.current_time()
    await until(lambda: not service.ready, 75)
    print(f"EngineCore under SIGSTOP: given up after {trio.current_time() - stopped:.1f} s")
    await ready(service)
    print(f"EngineCore under SIGSTOP: ready again after {trio.current_time() - stopped:.1f} s")
    assert "made no step" in error_logs[0].getMessage()
    assert not any(map(alive, tree))
    body = {"model": "m", "prompt": "The router", "max_tokens": 8}
    assert b"text_completion" in await completion(service, body)

    await until(lambda: "psm_" in (runtime / "leftovers.json").read_text())
    noted = json.loads((runtime / "leftovers.json").read_text())["shm"]
    tree = [p.pid for p in descendants(guard.pid)]
    os.kill(process_named(guard, "VLLM::Worker"), signal.SIGKILL)
    killed = trio.current_time()
    await until(lambda: not service.ready, 30)
    print(f"worker killed: seen after {trio.current_time() - killed:.1f} s")
    await until(lambda: not any(map(alive, tree)), 10)
    await until(lambda: not set(noted) & shm(), 1)
    await ready(service)
    await service.stop()
    assert descendants(guard.pid) == []


async def completion(service: EngineService, body: dict[str, Any]) -> bytes:
    headers = {"content-type": "application/json"}
    async with service.client.open("/v1/completions", headers, json.dumps(body).encode()) as reply:
        return b"".join([chunk async for chunk in reply.chunks()])


async def reported_numbers(service: EngineService, toy_model: Path, runtime: Path) -> None:
    """What the plan says is what vLLM says: weights, blocks of the KV cache, ceiling, and the options it was given."""
    planned = await service._planner.plan(EngineTarget(assignment(), toy_model))
    assert planned.sizing is not None
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(runtime / "engine.sock"))) as client:
        seen = await client.post("http://vllm/collective_rpc", json={"method": "get_model_inspection"})
    told = (await server_info(service))["vllm_config"]
    model, cache, scheduler = told["model_config"], told["cache_config"], told["scheduler_config"]
    assert planned.model.rank_bytes(1, 1) == pytest.approx(2 * parameters(seen.json()["results"][0]), rel=0.03)
    tokens = cache["num_gpu_blocks"] * cache["block_size"]
    assert planned.sizing.kv_bytes == cache["kv_cache_memory_bytes"]
    assert planned.sizing.kv_bytes / planned.model.slot_bytes(1, 1) == pytest.approx(tokens, rel=0.03)
    assert planned.ceiling_for(tokens) == planned.ceiling == service.ceiling == scheduler["max_num_seqs"] == 8
    assert planned.model.max_len == model["max_model_len"]
    assert in_flight(CPU_HOST, planned.wishes) // 2 == scheduler["max_num_batched_tokens"]
    assert (model["allowed_media_domains"], model["allowed_local_media_path"]) == (["media.invalid"], "")
    assert (model["served_model_name"], model["enforce_eager"], cache["enable_prefix_caching"]) == ("m", True, True)


def parameters(inspection: str) -> int:
    """Of the tree that vLLM prints of a Llama; `2 x LlamaDecoderLayer` begins a part that is there twice."""
    total, layers = 0, 1
    for line in inspection.splitlines():
        numbers = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
        if found := re.search(r"(\d+) x LlamaDecoderLayer", line):
            layers = int(found[1])
        elif line.startswith("    )"):
            layers = 1
        if "Parallel" in line or "RMSNorm" in line:
            rows = numbers.get("output_features") or numbers.get("org_vocab_size") or 1
            columns = numbers.get("in_features") or numbers.get("embedding_dim") or numbers["hidden_size"]
            total += rows * columns * layers
    return total


async def no_media_is_fetched(service: EngineService) -> None:
    """A text model refuses the part before the address is looked at; what a model that sees would do with it:
    `test_vllm_fetches_no_media_with_our_arguments`."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        for kind in ("image_url", "video_url", "audio_url"):
            part = {"type": kind, kind: {"url": f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"}}
            body = {"model": "m", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
            headers = {"content-type": "application/json"}
            async with service.client.open("/v1/chat/completions", headers, json.dumps(body).encode()) as reply:
                said = b"".join([chunk async for chunk in reply.chunks()])
            assert reply.status == 400, said
        with pytest.raises(BlockingIOError):
            trap.accept()


FETCH = """
import json, sys
from vllm.multimodal.media.connector import MediaConnector
for domains in json.loads(sys.argv[2]):
    try:
        MediaConnector(allowed_media_domains=domains).fetch_image(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, str(error)[:60].replace(chr(10), " "))
"""


@pytest.mark.engine
@pytest.mark.full
async def test_vllm_fetches_no_media_with_our_arguments(vllm_launcher: str) -> None:
    """vLLM's own fetching of what a request names: with our domain nothing connects, without it the trap does spring.

    The trap answers 404 to whoever comes.
    """
    planned = plan(Config(), assignment(), CPU_HOST, ModelFacts("X", 1, 1, 1, 1), Places("v", "m", "s", "t", "c"))
    ours = [value_of(planned.argv, "--allowed-media-domains")]
    came = 0

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal came
        came += 1
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/x.png"
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        python = str(Path(vllm_launcher).with_name("python"))
        for domains, connections in (([ours], 0), ([ours, None], 1)):
            done = await trio.run_process(
                [python, "-c", FETCH, url, json.dumps(domains)],
                capture_stdout=True, capture_stderr=True, env={**os.environ, **planned.env, "TMPDIR": "/tmp"},
            )  # fmt: skip
            assert b"ValueError The URL must be from one of the allowed domains" in done.stdout, done.stderr
            assert came == connections
        nursery.cancel_scope.cancel()
