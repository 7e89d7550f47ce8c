"""The form of `status --json`, held by a file: a member that goes or changes its type is another SCHEMA."""

import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from xim_agent import outside
from xim_agent.assignment.service import AssignmentService
from xim_agent.cache.service import Cache
from xim_agent.engine.service import EngineService
from xim_agent.hardware.report import Hardware
from xim_agent.history import Change, History
from xim_agent.identity.service import IdentityService
from xim_agent.mesh.client import RouterClient
from xim_agent.outside import SCHEMA, Process
from xim_agent.work.poller import Poller
from xim_agent.work.statistics import Request

FORM = Path(__file__).with_name("status_schema.txt")
PARTS: dict[str, Any] = {
    "agent": Process,
    "identity": IdentityService,
    "work": Poller,
    "mesh": RouterClient,
    "cache": Cache,
    "assignment": AssignmentService,
    "engine": EngineService,
    "hardware": Hardware,
    "history[]": Change,
    "requests[] (of `requests`)": Request,
}


def rows(name: str, kind: Any) -> list[str]:
    """One for each member that holds no others."""
    if is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        names = [f.name for f in fields(kind)] if is_dataclass(kind) else list(kind.__struct_fields__)
        hints = get_type_hints(kind)
        return [row for member in names for row in rows(f"{name}.{member}", hints[member])]
    if get_origin(kind) in (list, tuple) and get_args(kind):
        return rows(f"{name}[]", get_args(kind)[0])
    if get_origin(kind) in (types.UnionType, Union):
        inner = [one for one in get_args(kind) if one is not type(None)]
        if len(inner) == 1:
            return [f"{row} or null" for row in rows(name, inner[0])]
    if get_origin(kind) is Literal:
        return [f"{name}: {' '.join(map(str, get_args(kind)))}"]
    return [f"{name}: {getattr(kind, '__name__', kind) if get_origin(kind) is None else kind}"]


def form() -> str:
    found = [
        f"schema: {SCHEMA}",
        "config: by option, as in config/fields.py, secrets masked",
        "not_ready[]: str",
        "idle[]: str",
    ]
    found += [f"health[].{name}: {'float' if name == 'since' else 'str'}" for name in ("code", "text", "hint", "since")]
    for name, part in PARTS.items():
        kind = part if is_dataclass(part) else get_type_hints(part.statistics)["return"]
        found += rows(name, kind)
    return "\n".join(found) + "\n"


def test_every_member_and_its_type_is_as_written_down() -> None:
    """When this fails because a member is new, write it down; when one is gone or another, raise SCHEMA too."""
    assert form() == FORM.read_text()


def test_the_parts_are_those_of_a_status() -> None:
    source = Path(outside.__file__).read_text()
    for name in PARTS:
        if not name.startswith("requests"):
            assert f'"{name.removesuffix("[]")}":' in source


def test_history_keeps_what_changed_and_when() -> None:
    now, view = [1.0], {"engine": "stopped", "drain": ""}
    history = History(lambda: now[0], lambda: view)
    history.look()
    history.look()
    now[0] = 5.0
    view |= {"engine": "ready", "trouble disk_full": "no room"}
    history.look()
    del view["trouble disk_full"]
    now[0] = 6.0
    history.look()
    assert history.changes() == [
        Change(1.0, "engine", "", "stopped"), Change(5.0, "engine", "stopped", "ready"),
        Change(5.0, "trouble disk_full", "", "no room"), Change(6.0, "trouble disk_full", "no room", ""),
    ]  # fmt: skip
    for number in range(100):
        view["engine"] = str(number)
        history.look()
    assert len(history.changes()) == 50
    assert history.changes()[-1].after == "99"
