"""What `status` prints for people: one line for each thing that can be wrong, in the order data flows."""

from collections.abc import Iterator, Mapping
from typing import Any

from xim_agent.cli.progress import bytes_text, size
from xim_agent.cli.table import ago

Found = Mapping[str, Any]
SHOWN_CHANGES = 3


def lines(found: Found, now: float) -> Iterator[tuple[str, str]]:
    """(name, text); `now`: Unix seconds."""
    agent, work = found["agent"], found["work"]
    started = ago(agent["started"], now)
    yield "agent", f"{agent['version']}, process {agent['pid']}, started {started}"
    yield "state", _state(work)
    yield "router", _router(found["identity"], work, now)
    yield "identity", _identity(found["identity"], now)
    yield "model", _model(found["assignment"])
    yield "engine", _engine(found["engine"])
    yield "cache", f"{size(found['cache']['bytes_used'])} of {size(found['cache']['bound'])}"
    yield "requests", _requests(work["sender"])
    if (longest := work["sender"]["longest"]) is not None:
        so_far = f"{longest['seconds']:.0f} s, {size(longest['bytes'])} so far"
        yield "longest", f"{longest['request']} {longest['path']}, {so_far}"
    for change in found["history"][-SHOWN_CHANGES:]:
        yield (
            "changed",
            f"{change['what']}: {change['before'] or '-'} -> {change['after'] or '-'}, {ago(change['at'], now)}",
        )
    for reason in found["idle"]:
        yield "idle", reason
    for condition in found["health"]:
        cure = f"; {condition['hint']}" if condition["hint"] else ""
        yield "trouble", f"{condition['code']}: {condition['text']} (since {ago(condition['since'], now)}){cure}"


def one_line(found: Found) -> str:
    """The same in short, for where there is one line."""
    parts = [_state(found["work"]) if found["identity"]["enrolled"] else "not enrolled"]
    parts.append(f"model {_model(found['assignment'])}")
    parts.append(f"engine {_engine(found['engine'])}")
    parts += [f"{condition['code']}: {condition['text']}" for condition in found["health"]]
    return "; ".join(parts)


def _state(work: Found) -> str:
    asked = f", asked by {', '.join(work['drained_by'])}" if work["drained_by"] else ""
    return f"{work['phase']}{asked}"


def _router(identity: Found, work: Found, now: float) -> str:
    polled = f"last answer {ago(work['last_poll'], now)}"
    state = "answers" if work["link_up"] else "does not answer"
    return f"{identity['router'] or 'none yet'} {state}, {polled}{', suspended' if work['suspended'] else ''}"


def _identity(identity: Found, now: float) -> str:
    if not identity["enrolled"]:
        return "not enrolled"
    left = (identity["token_expires"] or now) - now
    return f"{identity['agent_id']} of {identity['project']}, token for {max(0.0, left) / 60:.0f} min more"


def _model(assignment: Found) -> str:
    model, generation = assignment["model"], assignment["generation"]
    text = f"{model['name']} {model['revision']}, generation {generation}" if model else "none"
    if assignment["wanted"] not in (None, generation):
        text += f", generation {assignment['wanted']} is wanted"
    if progress := assignment["progress"]:
        text += f", {progress['stage']}"
        if progress["total"]:
            text += f" {bytes_text(progress['done'], progress['total'], progress['rate'])}"
    return text


def _engine(engine: Found) -> str:
    failed = (
        f", {engine['failures']} failed ({engine['failure'] or 'served again since'})" if engine["failures"] else ""
    )
    return f"{engine['state']}, {engine['active']} of {engine['ceiling']} requests, {engine['starts']} starts{failed}"


def _requests(sender: Found) -> str:
    ended = ", ".join(f"{number} {name}" for name, number in sorted(sender["ended"].items()))
    taken = f"{sender['running']} running, {sender['accepted']} taken, {sender['refused']} refused"
    return f"{taken}; ended: {ended or 'none'}"
