"""Everything that `doctor` looks at, at once and each with a time limit. Nothing is made, changed or locked."""

import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import trio

from xim_agent.cache.look import look
from xim_agent.clock import Clock, SystemClock
from xim_agent.config import sources
from xim_agent.config.fields import Config
from xim_agent.config.paths import MAX_SOCKET_PATH, expected_runtime_directory, runtime_places, short_enough
from xim_agent.doctor import kernel, machine, network, places, tools, vllm
from xim_agent.doctor.identity import Key, credential, routers
from xim_agent.doctor.report import CHECKS, Finding, failure, from_error, ordered, skipped
from xim_agent.engine import launcher, planner
from xim_agent.engine.command import plan
from xim_agent.engine.environment import child_environment, gpu_environment
from xim_agent.engine.facts import ModelFacts
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.cards import Cards
from xim_agent.hardware.probe import probe
from xim_agent.hardware.report import Hardware
from xim_agent.identity.join_key import JoinKey, parse_router_url
from xim_agent.identity.refusals import explain
from xim_agent.identity.rotation import State
from xim_agent.identity.store import LOCK, StateStore
from xim_agent.mesh.messages import Assignment, ModelRef, Serving
from xim_agent.mesh.reach import Reached, reach
from xim_agent.outcome import RouterError
from xim_agent.outside import longest_stop

GB = 10**9
SECONDS = 15.0  # of a file system that hangs
ROUTER_SECONDS = 40.0  # resolver, connection and reply have limits of their own
MACHINE_SECONDS = 70.0  # AMD's tools may take 20 s each, three times
T = TypeVar("T")
Work = Callable[[], Awaitable[Sequence[Finding]]]


async def examine(config: Config | None, checked: Finding, environ: Mapping[str, str]) -> list[Finding]:
    """One finding for each of CHECKS. `checked`: of the configuration; `config` None: it is not valid.

    Cancellation kills the tools that run and leaves a file system or driver that hangs to its thread.
    """
    looks = Looks(config or Config(), environ)
    every: dict[tuple[str, ...], tuple[float, Work]] = {
        ("buffers",): (SECONDS, looks.of_buffers),
        ("docker", "compose", "toolkit"): (SECONDS, looks.of_versions),
    }
    if config is not None:
        every |= {
            ("state", "credential"): (SECONDS, looks.of_identity),
            ("router", "clock"): (SECONDS + ROUTER_SECONDS, looks.of_routers),
            ("agent", "files", "memlock"): (SECONDS, looks.of_process),
            ("sockets",): (SECONDS, looks.of_sockets),
            ("cache",): (SECONDS, looks.of_cache),
            ("gpu", "amd", "shm", "vllm"): (MACHINE_SECONDS, looks.of_machine),
            ("drain",): (SECONDS, looks.of_stops),
        }
    async with trio.open_nursery() as nursery:
        for names, (seconds, work) in every.items():
            nursery.start_soon(looks.within, names, seconds, work)
    found = {checked.check: checked, **looks.findings}
    return ordered(found.get(name, skipped(name, "looked at once the configuration is valid")) for name in CHECKS)


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


@dataclass
class Looks:
    """`environ` as the agent would get it. `root` and `nvml` stand in for the machine in tests."""

    config: Config
    environ: Mapping[str, str]
    root: Path = Path("/")
    clock: Clock = field(default_factory=SystemClock)
    findings: dict[str, Finding] = field(default_factory=dict)
    _state: State | None = None
    _known: trio.Event = field(default_factory=trio.Event)

    async def within(self, names: Sequence[str], seconds: float, work: Work) -> None:
        found: Sequence[Finding] | None = None
        with trio.move_on_after(seconds):
            found = await work()
        if found is None:
            text = f"this look had no end within {seconds:.0f} s: a disk, a driver or a tool hangs"
            found = [failure(name, text, "look at dmesg and at mounts of the network", Exit.STATE) for name in names]
        self.findings.update({finding.check: finding for finding in found})
        if "state" in names:
            self._known.set()

    # -- identity and router --

    async def of_identity(self) -> Sequence[Finding]:
        return await _in_thread(self._identity)

    def _identity(self) -> Sequence[Finding]:
        directory = self.config.config_path
        loaded: list[State | None] = []
        state = places.state(directory, lambda: loaded.append(StateStore.look(directory)))
        if not loaded:
            return state, skipped("credential", "the state cannot be used, see state")
        self._state = loaded[0]
        return state, credential(self._state, self._key(), self.clock.now())

    def _key(self) -> Key:
        try:
            text = sources.join_key(self.config)
            return JoinKey.parse(text) if text else None
        except AgentError as error:
            return error

    async def of_routers(self) -> Sequence[Finding]:
        await self._known.wait()
        given = self.config.router_url
        try:
            given = parse_router_url(given) if given else None
        except AgentError as error:
            return from_error("router", error), network.clock(())
        every = list(routers(given, self._state, await _in_thread(self._key)))
        answers = [Reached(router) for router in every]

        async def ask(number: int) -> None:
            answer = await reach(every[number], insecure=self.config.allow_insecure, clock=self.clock)
            if isinstance(answer.error, RouterError):
                answer = replace(answer, error=explain(answer.error))
            answers[number] = answer

        async with trio.open_nursery() as nursery:
            for number in range(len(every)):
                nursery.start_soon(ask, number)
        return network.router(answers), network.clock(answers)

    # -- this process, its directories --

    async def of_process(self) -> Sequence[Finding]:
        return await _in_thread(self._process)

    def _process(self) -> Sequence[Finding]:
        config = self.config
        pid = kernel.holder(self.root, config.config_path / LOCK)
        try:
            limits, whose = kernel.limits(self.root, pid or "self"), "of the running agent" if pid else "of this shell"
        except OSError:  # the lock outlives its process for as long as the guard cleans up
            limits, whose = kernel.limits(self.root, "self"), "of this shell"
        requests = config.max_concurrent or config.max_num_seqs or 64
        ranks = config.tensor_parallel_size * config.pipeline_parallel_size
        return (
            kernel.agent(pid, config.config_path),
            kernel.files(limits["files"], requests, whose),
            kernel.memlock(limits["memlock"], ranks, kernel.has_infiniband(self.root)),
        )

    async def of_sockets(self) -> Sequence[Finding]:
        every = runtime_places(self.config.config_path, self.environ)
        engine = self.config.vllm_socket_path
        return [await _in_thread(places.sockets, engine, every, short_enough, MAX_SOCKET_PATH)]

    async def of_cache(self) -> Sequence[Finding]:
        return [await _in_thread(self._cache)]

    def _cache(self) -> Finding:
        directory = self.config.model_cache_path
        try:
            there = places.nearest(directory)
            seen = look(directory, int(self.config.model_cache_max_size_gb * GB), there)
            return places.cache(directory, seen.limits, seen.used, seen.elsewhere)
        except AgentError as error:
            return from_error("cache", error)
        except OSError as error:
            text = f"the model cache {directory} cannot be read: {error.strerror or error}"
            return failure("cache", text, f"`chown -R {os.geteuid()} {directory}`; `namei -l {directory}`", Exit.STATE)

    async def of_buffers(self) -> Sequence[Finding]:
        return [await _in_thread(kernel.buffers, self.root)]

    # -- hardware and engine --

    async def of_machine(self) -> Sequence[Finding]:
        found = await probe(root=self.root, env=gpu_environment(self.config, self.environ))
        hardware = machine.chosen(found, self.config)
        ranks = self.config.tensor_parallel_size * self.config.pipeline_parallel_size
        used = hardware.devices[:ranks] if hardware.accelerator == "nvidia" else ()
        lost = await _in_thread(_lost, frozenset(device.index for device in used)) if used else []
        device = self.root / "dev/kfd"
        return (
            machine.gpu(hardware, self.config, lost),
            machine.amd(hardware, self.config, device.exists(), os.access(device, os.R_OK | os.W_OK)),
            machine.shm(hardware, self.config),
            await _in_thread(self._vllm, hardware),
        )

    def _vllm(self, hardware: Hardware) -> Finding:
        config = self.config
        if kernel.holder(self.root, config.config_path / LOCK):  # what the running engine holds is held by right
            hardware = machine.idle(hardware)
        try:
            program = launcher.find(config.vllm_path, self.environ)
            runtime = expected_runtime_directory(config.config_path, self.environ)
            known = planner.flags_of(runtime, program)
            version = launcher.version(program)

            def dry_run() -> tuple[str, ...]:
                return _dry_run(config, hardware, runtime, program, known)

            return vllm.installation(program, version, known is not None, dry_run)
        except AgentError as error:
            return from_error("vllm", error)
        except OSError as error:
            return failure("vllm", f"vLLM cannot be read: {error}", "see who owns it; the agent's user must read it")

    # -- what is around --

    @property
    def _for_tools(self) -> dict[str, str]:
        """Without what a one-file program has set for itself, and without secrets."""
        return child_environment(self.environ, {}, getattr(sys, "_MEIPASS", None))

    async def of_versions(self) -> Sequence[Finding]:
        nvidia = (self.root / "proc/driver/nvidia/version").exists()
        return await tools.versions(self._for_tools, self.root, nvidia)

    async def of_stops(self) -> Sequence[Finding]:
        return [await tools.drain(self._for_tools, self.root, longest_stop(self.config.drain_timeout_seconds))]


def _lost(indices: frozenset[int]) -> list[tuple[str, str]]:
    """Of the NVIDIA cards with these indices, those that do not answer: what and cure. Blocking."""
    cards = Cards(indices)
    try:
        return [(trouble.what, trouble.cure) for trouble in cards.look().lost]
    finally:
        cards.close()


def _dry_run(
    config: Config, hardware: Hardware, runtime: Path, program: Path, known: frozenset[str] | None
) -> tuple[str, ...]:
    """Warnings of a plan for a model that fits anywhere. Offload is left out: shm tells of it; so does gpu of too few.

    Raises AgentError as `command.plan` does.
    """
    ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    small = ModelFacts(
        "LlamaForCausalLM", weights_bytes=ranks << 20, full_layers=ranks, kv_heads=ranks, head_dim=64,
        max_len=2048, heads=ranks, layers=ranks,
    )  # fmt: skip
    there = planner.places(config, runtime, str(program), Path("/model"), Path("/compile"))
    assignment = Assignment("", "", 0, 0, ModelRef("m", "m", "", "", 0), Serving(served_model_name="m"))
    plain = replace(config, kv_cache_backend="none", max_model_len=None, vllm_quantization=None)
    try:
        return plan(plain, assignment, hardware, small, there, known, launcher.has_bitsandbytes(program)).warnings
    except AgentError as error:
        if error.code == "too_few_devices":
            return ()
        raise
