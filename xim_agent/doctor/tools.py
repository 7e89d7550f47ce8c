"""Docker, Compose, NVIDIA's container toolkit and systemd, asked by their own programs: none of it is ever started."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import trio

from xim_agent.doctor.report import Finding, ok, skipped, warning, worst

TOOL_SECONDS = 5.0
# Below these the shipped files do not work: healthcheck start intervals and device reservations, `include` and
# `!override` of Compose files, CDI names of GPUs.
OLDEST = {"docker": (24, 0), "compose": (2, 20), "toolkit": (1, 14)}
_ASK = {
    "docker": ("docker", "--version"),
    "compose": ("docker", "compose", "version"),
    "toolkit": ("nvidia-ctk", "--version"),
}
_SAYS = {
    "docker": r"Docker version (\d+)\.(\d+)",
    "compose": r"Compose version v?(\d+)\.(\d+)",
    "toolkit": r"Container Toolkit CLI version (\d+)\.(\d+)",
}
_NAMES = {"docker": "Docker", "compose": "Docker Compose", "toolkit": "NVIDIA Container Toolkit"}
_UNIT = "xerotier-xim-agent"
_SHOW = ("systemctl", "show", "--property=Id,LoadState,TimeoutStopUSec", f"{_UNIT}.service", f"{_UNIT}@*.service")
# Compose labels what it starts, and gives stop_grace_period to the container. Nothing else of it is asked for:
# its environment holds the join key.
_LIST = ("docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project")
_LOOK = ("docker", "inspect", "--format", "{{.Name}}|{{.Config.StopTimeout}}|{{json .Config.Entrypoint}}")
_CONFIGURE = "`nvidia-ctk runtime configure --runtime=docker`"
DOCKERS_SECONDS = 10.0  # between SIGTERM and SIGKILL where nothing else is said
_SPAN = {
    "y": 31557600.0, "month": 2629800.0, "w": 604800.0, "d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0,
    "ms": 1e-3, "us": 1e-6,
}  # fmt: skip


def in_container(root: Path) -> bool:
    return any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))


async def said(command: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """What a tool prints; None when it is not installed, fails, or says nothing within 5 s. Cancellation kills it."""
    program = shutil.which(command[0], path=environ.get("PATH", os.defpath))
    if program is None:
        return None
    with trio.move_on_after(TOOL_SECONDS):
        try:
            done = await trio.run_process(
                [program, *command[1:]],
                stdin=b"",
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
                env=dict(environ),
                deliver_cancel=_kill,
            )
        except OSError:
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None
    return None


async def _kill(process: trio.Process) -> None:  # noqa: ASYNC124 - trio wants it so
    process.kill()


async def versions(environ: Mapping[str, str], root: Path, nvidia: bool) -> list[Finding]:
    """`nvidia`: this machine has a card of theirs."""
    if in_container(root):
        return [skipped(name, f"{_NAMES[name]} is on the host, this is a container") for name in OLDEST]
    docker = await said(_ASK["docker"], environ)
    found = {"docker": docker}
    for name in ("compose", "toolkit"):
        found[name] = await said(_ASK[name], environ) if docker is not None else None
    return [_version(name, text, docker is not None, nvidia) for name, text in found.items()]


def _version(name: str, text: str | None, docker: bool, nvidia: bool) -> Finding:
    title, oldest = _NAMES[name], OLDEST[name]
    needed = f"{oldest[0]}.{oldest[1]}"
    if text is None:
        if name == "toolkit" and docker and nvidia:
            text = "Docker is here, NVIDIA's Container Toolkit is not: containers get no GPU"
            return warning(name, text, f"install nvidia-container-toolkit {needed} or later, then {_CONFIGURE}")
        return skipped(name, f"{title} is not installed")
    version = re.search(_SAYS[name], text)
    if version is None:
        return skipped(name, f"it is not {title} that answers: {text[:60].strip()}")
    have = int(version[1]), int(version[2])
    if have < oldest:
        text = f"{title} {have[0]}.{have[1]} is older than {needed}"
        return warning(name, text, f"install {title} {needed} or later, if the agent is to run in a container")
    return ok(name, f"{title} {have[0]}.{have[1]}")


async def drain(environ: Mapping[str, str], root: Path, needed: float) -> Finding:
    """Whether a stop, which takes `needed` seconds at most, is cut short by what stops the agent."""
    found = []
    if (root / "run/systemd/system").exists() and (text := await said(_SHOW, environ)):
        found += [_enough(name, seconds, needed, "TimeoutStopSec") for name, seconds in units(text).items()]
    if not in_container(root) and (ids := (await said(_LIST, environ) or "").split()):
        for name, seconds in containers(await said((*_LOOK, *ids), environ) or "").items():
            found.append(_enough(name, seconds, needed, "stop_grace_period"))
    if not found:
        return skipped("drain", f"no unit and no container of ours is seen here; a stop takes {needed:.0f} s at most")
    return worst("drain", found)


def _enough(name: str, seconds: float, needed: float, setting: str) -> Finding:
    if seconds >= needed:
        return ok("drain", f"{name} is given {seconds:g} s to stop, it takes {needed:.0f} at most")
    grace = f"XEROTIER_AGENT_STOP_GRACE={needed + 5:.0f}s"
    how = {
        "TimeoutStopSec": f"`systemctl edit {name}`: [Service] TimeoutStopSec={needed + 5:.0f}",
        "stop_grace_period": f"{grace} in the Compose file's .env, then `docker compose up -d`",
    }
    text = f"{name} is killed after {seconds:g} s, a stop takes up to {needed:.0f}: running requests would be lost"
    return warning("drain", text, f"{how[setting]}, or lower DRAIN_TIMEOUT_SECONDS")


def units(text: str) -> dict[str, float]:
    """Seconds by unit, from what `systemctl show` prints."""
    found = {}
    for block in text.strip().split("\n\n"):
        rows = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if rows.get("LoadState") == "loaded" and (seconds := span(rows.get("TimeoutStopUSec", ""))) is not None:
            found[rows.get("Id", _UNIT)] = seconds
    return found


def span(text: str) -> float | None:
    """Seconds of systemd's `2min 30s`; None for what has no such form."""
    if text == "infinity":
        return float("inf")
    parts = [re.fullmatch(r"([\d.]+)([a-z]+)", word) for word in text.split()]
    if not parts or not all(part and part[2] in _SPAN for part in parts):
        return None
    return sum(float(part[1]) * _SPAN[part[2]] for part in parts if part)


def containers(text: str) -> dict[str, float]:
    """Seconds by container, of those that run our agent, from what `docker inspect` prints for _LOOK."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("|")
        seconds, _, entrypoint = rest.partition("|")
        if _UNIT in entrypoint and '"router"' not in entrypoint:  # that one has nothing to drain
            found[name.removeprefix("/")] = float(seconds) if seconds.isdecimal() else DOCKERS_SECONDS
    return found
