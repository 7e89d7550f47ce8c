"""Models, assignments and API keys in the router's database. Each function is one short transaction."""

import json
import secrets
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from xim_agent.errors import AgentError, Exit
from xim_agent.mesh.messages import Task
from xim_agent.router.sql import digest, transaction

ALL = "*"
API_KEY_PREFIX = "sk-xim-"


@dataclass(frozen=True)
class Published:
    """A revision of a model. `manifest`: `sha256:<hex>`; `created`: Unix seconds."""

    name: str
    revision: str
    id: str
    manifest: str
    size_bytes: int
    stored_bytes: int
    task: str
    created: float


@dataclass(frozen=True)
class Assigned:
    model: Published
    serving: dict[str, Any]
    generation: int

    def payload(self, agent_id: str, now: float) -> dict[str, Any]:
        """What is signed for an agent (wire-protocol §4), without `iss`."""
        m = self.model
        model = {"id": m.id, "name": m.name, "revision": m.revision, "manifest": m.manifest, "size_bytes": m.size_bytes}
        return {
            "sub": agent_id,
            "iat": int(now),
            "generation": self.generation,
            "model": model,
            "serving": self.serving,
        }


def task_of(config: Mapping[str, Any], files: Iterable[str]) -> Task:
    """What a model is for, from its config.json and the names of its files: `embed`, `score` or `generate`."""
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "score"
    if "modules.json" in files or any(name.endswith(("Model", "ForMaskedLM")) for name in architectures):
        return "embed"
    return "generate"


def register(db: sqlite3.Connection, model: Published) -> None:
    """Makes a published revision known. Where it replaces another content, agents that have it assigned fetch again."""
    key = (model.name, model.revision)
    with transaction(db):
        old = db.execute("SELECT manifest FROM models WHERE name=? AND revision=?", key).fetchone()
        db.execute("INSERT OR REPLACE INTO models VALUES(?, ?, ?, ?, ?, ?, ?, ?)", astuple(model))
        if old and old[0] != model.manifest:
            changed = (_next_generation(db), *key)
            db.execute("UPDATE assignments SET generation=? WHERE name=? AND revision=?", changed)


def _next_generation(db: sqlite3.Connection) -> int:
    """One counter for all agents: a generation names one assignment for ever. Inside a transaction."""
    row = db.execute("SELECT value FROM settings WHERE key='generation'").fetchone()
    generation = int(row[0]) + 1 if row else 1
    db.execute("INSERT OR REPLACE INTO settings(key, value) VALUES('generation', ?)", (str(generation),))
    return generation


def models(db: sqlite3.Connection) -> list[Published]:
    """Newest first."""
    return [Published(*row) for row in db.execute("SELECT * FROM models ORDER BY created DESC, rowid DESC")]


def find_model(db: sqlite3.Connection, name: str, revision: str | None = None) -> Published | None:
    """The revision, or the newest one."""
    return next((m for m in models(db) if m.name == name and revision in (None, m.revision)), None)


def model_name(db: sqlite3.Connection, model_id: str, revision: str) -> str | None:
    """What clients call the model that an agent reports."""
    row = db.execute("SELECT name FROM models WHERE id=? AND revision=?", (model_id, revision)).fetchone()
    return str(row[0]) if row else None


def assigned_models(db: sqlite3.Connection) -> list[Published]:
    """What clients may ask for: each model with an assignment, once."""
    query = "SELECT m.* FROM models m JOIN assignments a USING(name, revision) ORDER BY m.name, m.created"
    return list({row[0]: Published(*row) for row in db.execute(query)}.values())


def assignment(db: sqlite3.Connection, agent_id: str) -> Assigned | None:
    """The agent's own assignment, else that of all agents."""
    query = (
        "SELECT m.*, a.serving, a.generation FROM assignments a JOIN models m USING(name, revision)"
        " WHERE a.agent_id IN (?, ?) ORDER BY a.agent_id = ? LIMIT 1"
    )
    row = db.execute(query, (agent_id, ALL, ALL)).fetchone()
    return Assigned(Published(*row[:-2]), json.loads(row[-2]), row[-1]) if row else None


def expects(db: sqlite3.Connection, project: str, model: str) -> bool:
    """Whether an enrolled agent of the project, that is not to drain, has this model assigned."""
    query = (
        "SELECT 1 FROM agents g JOIN assignments a ON a.agent_id ="
        " coalesce((SELECT agent_id FROM assignments WHERE agent_id = g.agent_id), ?)"
        " WHERE g.project = ? AND g.state = 'enrolled' AND a.name = ?"
        " AND g.agent_id NOT IN (SELECT agent_id FROM drained) LIMIT 1"
    )
    return db.execute(query, (ALL, project, model)).fetchone() is not None


def assign(db: sqlite3.Connection, name: str, revision: str | None, agent_id: str | None) -> Assigned:
    """Assigns a published model (its newest revision) to one agent or to all, present and future.

    Raises AgentError `model_unknown` or `agent_unknown`, exit 2. The same assignment again changes nothing.
    """
    model = find_model(db, name, revision)
    if model is None:
        wanted = f"{name}@{revision}" if revision else name
        known = ", ".join(f"{m.name}@{m.revision}" for m in models(db)[:10]) or "none yet"
        hint = f"published: {known}; publish one with `router model publish PATH --name {name}`"
        raise AgentError("model_unknown", f"no model {wanted} is published", hint=hint, exit_code=Exit.USAGE)
    known_agent = "SELECT 1 FROM agents WHERE agent_id=? AND state != 'removed'"
    if agent_id is not None and not db.execute(known_agent, (agent_id,)).fetchone():
        raise AgentError(
            "agent_unknown",
            f"no agent {agent_id} is enrolled here",
            hint="the dashboard shows the ids; without --agent the model goes to all agents",
            exit_code=Exit.USAGE,
        )
    who = agent_id or ALL
    serving: dict[str, Any] = {
        "served_model_name": model.name,
        "task": model.task,
        "quantization": None,
        "max_model_len": None,
        "engine_args": [],
    }
    with transaction(db):
        row = db.execute("SELECT name, revision, serving, generation FROM assignments WHERE agent_id=?", (who,))
        old = row.fetchone()
        if old and old[:3] == (model.name, model.revision, json.dumps(serving)):
            return Assigned(model, serving, old[3])
        generation = _next_generation(db)
        db.execute(
            "INSERT OR REPLACE INTO assignments(agent_id, name, revision, serving, generation) VALUES(?, ?, ?, ?, ?)",
            (who, model.name, model.revision, json.dumps(serving), generation),
        )
    return Assigned(model, serving, generation)


def create_api_key(db: sqlite3.Connection, project: str, now: float) -> str:
    """The key's text; only its hash is kept."""
    key = API_KEY_PREFIX + secrets.token_urlsafe(32)
    db.execute("INSERT INTO api_keys(hash, project, created) VALUES(?, ?, ?)", (digest(key.encode()), project, now))
    return key


def project_of(db: sqlite3.Connection, api_key: str) -> str | None:
    """The project of a valid key."""
    hashed = digest(api_key.encode("utf-8", "surrogateescape"))
    row = db.execute("SELECT project FROM api_keys WHERE hash=? AND revoked IS NULL", (hashed,)).fetchone()
    return str(row[0]) if row else None
