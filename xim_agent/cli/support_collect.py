"""What goes into a support bundle. A part that cannot be had is told in `problems`, and the others go on."""

import json
import os
import platform
import ssl
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import trio

from xim_agent import PROTOCOL, __version__, leaks, log
from xim_agent.cli import agent_reach, cache_reach
from xim_agent.cli.common import ignore
from xim_agent.cli.doctor_look import examine
from xim_agent.config import sources
from xim_agent.config.config import describe, unknown_variables
from xim_agent.config.fields import PREFIX, Config
from xim_agent.doctor.report import Finding, document
from xim_agent.engine import launcher
from xim_agent.engine.environment import gpu_environment
from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.document import to_document
from xim_agent.hardware.probe import probe
from xim_agent.identity.store import StateStore

SCHEMA = 1
_LIBRARIES = (
    "trio",
    "httpx",
    "h11",
    "hypercorn",
    "starlette",
    "cryptography",
    "pyjwt",
    "msgspec",
    "zstandard",
    "click",
)
AGENT_SECONDS = 30.0


@dataclass
class Collected:
    """`members`: name → text, without secrets; `leaks`: what the running agent has found in its own."""

    members: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    leaks: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        self.members[name] = log.redact(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")

    def missing(self, name: str, error: AgentError) -> None:
        self.problems[name] = log.redact(f"{error.message} [{error.code}]")


async def collect(config: Config | None, checked: Finding, environ: Mapping[str, str]) -> Collected:
    """`config` None: it is not valid, as `checked` says. Nothing is changed. Cancellation leaves nothing behind."""
    found = Collected()
    found.add("versions.json", _versions(config, environ))
    ours = sorted(name for name in environ if name.startswith(PREFIX))
    found.add("environment.json", {"set": ours, "unknown": unknown_variables(ours)})
    if config is not None:
        await trio.to_thread.run_sync(_hide_state, config)
        found.add("configuration.json", describe(config))
        await _from_agent(found, config)
        await _cache(found, config)
        machine = await probe(env=gpu_environment(config, environ))
        found.add("hardware.json", to_document(machine))
        await trio.to_thread.run_sync(_plan, found, config, machine)
    found.add("doctor.json", document(await examine(config, checked, environ), __version__))
    about = {"schema": SCHEMA, "members": sorted(found.members), "problems": found.problems}
    found.add("about.json", about)
    return found


def checked(found: Collected) -> dict[str, str]:
    """The members. Raises AgentError `secret_found` (exit 3), which names member and kind, when one holds a secret."""
    everywhere = sorted({*leaks.find(found.members, log.hidden()), *found.leaks})
    if everywhere:
        where = ", ".join(f"{kind} in {member}" for member, kind in everywhere)
        raise AgentError(
            "secret_found",
            f"nothing was written, a secret is in what was collected: {where}",
            hint="look at that part with `status --json`, `doctor` or the log, and remove what tells it; where the "
            "agent itself told it, please report that",
            exit_code=Exit.DAMAGED,
        )
    return found.members


async def _from_agent(found: Collected, config: Config) -> None:
    try:
        with trio.move_on_after(AGENT_SECONDS):
            for name in ("status", "requests"):
                found.add(f"{name}.json", await agent_reach.reach(config, name, {}, ignore))
            logs = await agent_reach.reach(config, "logs", {}, ignore)
            found.add("log-agent.jsonl", "\n".join(logs["agent"]) + "\n")
            found.add("log-engine.jsonl", "\n".join(logs["engine"]) + "\n")
            found.leaks = [(member, kind) for member, kind in logs["leaks"]]
    except AgentError as error:
        found.missing("agent", error)


async def _cache(found: Collected, config: Config) -> None:
    try:
        found.add("cache.json", await cache_reach.reach(config, "cache/ls", {}, ignore))
    except AgentError as error:
        found.missing("cache", error)


def _plan(found: Collected, config: Config, machine: Any) -> None:
    """For each model with files in the cache, as `plan` would say it on this machine now."""
    from xim_agent.cli.plan import planned

    try:
        ready = config.model_cache_path / "ready"
        directories = sorted(path for name in ready.iterdir() for path in name.iterdir() if path.is_dir())
    except OSError as error:
        found.problems["plan"] = log.redact(f"no ready model: {error}")
        return
    plans = {}
    for directory in directories:
        try:
            plans[str(directory.relative_to(ready))] = planned(config, machine, directory, None)
        except AgentError as error:
            found.missing(f"plan {directory.relative_to(ready)}", error)
        except (OSError, ValueError) as error:
            found.problems[f"plan {directory.relative_to(ready)}"] = log.redact(str(error))
    found.add("plan.json", plans)


def _hide_state(config: Config) -> None:
    """So that they are taken out, and looked for. A state that cannot be read is one that cannot be told."""
    with suppress(AgentError):
        log.hide(sources.join_key(config), kind="join key")
    with suppress(AgentError, OSError):
        state = StateStore.look(config.config_path)
        if state is not None:
            log.hide(state.key, kind="private key")
            if state.enrollment is not None:
                log.hide(state.enrollment.token, kind="XEM token")
                log.hide(state.enrollment.current, state.enrollment.previous, kind="refresh token")


def _versions(config: Config | None, environ: Mapping[str, str]) -> dict[str, Any]:
    libraries = {}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            libraries[name] = metadata.version(name)
    vllm = None
    if config is not None:
        with suppress(AgentError, OSError):
            vllm = launcher.version(launcher.find(config.vllm_path, environ))
    system = None
    with suppress(OSError):
        lines = Path("/etc/os-release").read_text(encoding="utf-8", errors="replace").splitlines()
        system = next((line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME=")), None)
    return {
        "agent": __version__, "protocol": PROTOCOL, "python": sys.version, "openssl": ssl.OPENSSL_VERSION,
        "kernel": platform.release(), "machine": platform.machine(), "libc": " ".join(platform.libc_ver()),
        "system": system, "uid": os.geteuid(), "vllm": vllm, "libraries": libraries,
    }  # fmt: skip
