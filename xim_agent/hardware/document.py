"""Hardware as a JSON document: what `plan --json` prints, and what `plan --hardware` takes. Pure."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

import msgspec

from xim_agent.errors import AgentError, Exit
from xim_agent.hardware.report import Cpu, Device, Hardware

# Members of the report to the router (report.py) that say nothing about the engine.
_REPORT_ONLY = ("cache_bytes", "tier")
_MOST = 1 << 50  # bytes, CPUs


def to_document(hardware: Hardware) -> dict[str, Any]:
    return asdict(hardware)


def from_document(data: bytes, name: str) -> Hardware:
    """`data`: the object of `to_document`, the report of `report.py`, or a whole output of `plan --json`. `name`: for
    the error.

    A file may be written by hand: needed are `accelerator`, `memory_bytes`, and of each device `name` and
    `memory_total_bytes`. What is left out is that of an idle machine. Raises AgentError `hardware_invalid`.
    """
    try:
        given = json.loads(data)
        if isinstance(given, dict) and isinstance(given.get("hardware"), dict):
            given = given["hardware"]
        if not isinstance(given, dict):
            raise ValueError("it is no JSON object")
        return _checked(msgspec.convert(_whole(given), Hardware))
    except (ValueError, TypeError, RecursionError) as error:  # msgspec's are ValueErrors
        raise AgentError(
            "hardware_invalid",
            f"{name} describes no hardware: {error}",
            hint="make one with `xerotier-xim-agent plan --json > FILE` on a machine like it, and edit that",
            exit_code=Exit.CONFIG,
        ) from error


def _whole(given: Mapping[str, Any]) -> dict[str, Any]:
    """With what may be left out. Raises ValueError for members that nothing reads: a slip of the pen, most likely."""
    _known("", given, {*(f.name for f in fields(Hardware)), *_REPORT_ONLY})
    _needed("", given, ("accelerator", "memory_bytes"))
    cpu = {"model": "unknown", "cores": 1, **_object(given.get("cpu", {}))}
    _known("cpu.", cpu, {f.name for f in fields(Cpu)})
    cpu.setdefault("threads", cpu["cores"])
    cpus = given.get("cpus", list(range(cpu["threads"])) if _small(cpu["threads"]) else None)
    devices = []
    for index, device in enumerate(map(_object, given.get("devices", []))):
        _known(f"devices[{index}].", device, {f.name for f in fields(Device)})
        _needed(f"devices[{index}].", device, ("name", "memory_total_bytes"))
        devices.append({"index": index, "uuid": "", "memory_free_bytes": device["memory_total_bytes"], **device})
    defaults = {
        "cpus": cpus,
        "cpu_limit": float(len(cpus)) if isinstance(cpus, list) else None,
        "memory_total_bytes": given["memory_bytes"],
        "shm_bytes": given["memory_bytes"] // 2 if isinstance(given["memory_bytes"], int) else None,
    }
    return {**defaults, **given, "cpu": cpu, "devices": devices}


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no object")
    return value


def _known(where: str, given: Mapping[str, Any], names: Collection[str]) -> None:
    if strange := sorted(set(given) - set(names)):
        raise ValueError(f"nothing is known of {where}{strange[0]}; there is {', '.join(sorted(names))}")


def _needed(where: str, given: Mapping[str, Any], names: Collection[str]) -> None:
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{where}{missing[0]} is missing")


def _small(value: object) -> bool:
    return isinstance(value, int) and 0 < value <= 1 << 16


def _checked(hardware: Hardware) -> Hardware:
    amounts = [hardware.memory_bytes, hardware.memory_total_bytes, hardware.shm_bytes, hardware.cpu_limit]
    amounts += [n for d in hardware.devices for n in (d.memory_total_bytes, d.memory_free_bytes)]
    if wild := [n for n in amounts if not 0 <= n <= _MOST]:
        raise ValueError(f"{wild[0]} is out of range")
    if not hardware.cpus or not _small(len(hardware.cpus)):
        raise ValueError("cpus names no CPU")
    if (hardware.accelerator == "cpu") == bool(hardware.devices):
        raise ValueError(f"accelerator is {hardware.accelerator}, and there are {len(hardware.devices)} devices")
    if over := [d for d in hardware.devices if d.memory_free_bytes > d.memory_total_bytes]:
        raise ValueError(f"of devices[{over[0].index}] more memory is free than there is")
    return hardware
