"""Lines of the log: their fields by the table, one line for each event, what is kept of them."""

import ast
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xim_agent import log
from xim_agent.log_fields import LOG_FIELDS

ROOT = Path(log.__file__).parent
FIXED = {"time", "level", "logger", "message", "traceback"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TREES = {path: ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def functions_named(name: str) -> Iterator[ast.AST]:
    for tree in TREES.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS) and node.name == name)


def names(value: ast.AST, around: ast.AST) -> Iterator[str]:
    """Every name that the expression can give: of literals, of variables of the function, of functions that give it."""
    if isinstance(value, ast.Dict):
        for key, inner in zip(value.keys, value.values, strict=True):
            if key is None:
                yield from names(inner, around)
            else:
                yield from name_of(key, value)
    elif isinstance(value, ast.DictComp):
        yield from name_of(value.key, value)
    elif isinstance(value, ast.BinOp):
        yield from names(value.left, around)
        yield from names(value.right, around)
    elif isinstance(value, ast.Call):
        called = value.func.attr if isinstance(value.func, ast.Attribute) else ast.unparse(value.func)
        for function in functions_named(called):
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield from names(node.value, function)
    elif isinstance(value, ast.Name):
        yield from of_variable(value.id, around)
    elif isinstance(value, ast.IfExp):
        yield from names(value.body, around)
        yield from names(value.orelse, around)


def of_variable(name: str, around: ast.AST) -> Iterator[str]:
    for node in ast.walk(around):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id == name:
                    yield from names(node.value, around)
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
                    yield from name_of(target.slice, around)


def name_of(key: ast.AST, around: ast.AST) -> Iterator[str]:
    if isinstance(key, ast.Constant):
        yield str(key.value)
    elif isinstance(key, ast.JoinedStr):  # "{hop}_ms": one for each hop
        yield "*" + "".join(str(part.value) for part in key.values if isinstance(part, ast.Constant))
    else:
        yield f"a name that is not written down: {ast.unparse(key)}"


def used() -> dict[str, str]:
    """Name → where."""
    found: dict[str, str] = {}
    for path, tree in TREES.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                for word in call.keywords:
                    if word.arg == "extra":
                        where = f"{path.relative_to(ROOT)}:{call.lineno}"
                        some = dict.fromkeys(names(word.value, function), where)
                        found |= some or {f"nothing is known of {ast.unparse(word.value)}": where}
    return found


def test_every_field_is_in_the_table_and_the_table_has_no_other() -> None:
    found = used()
    spelled = {name for name in found if not name.startswith("*")}
    endings = tuple(name[1:] for name in found if name.startswith("*"))
    assert {name: found[name] for name in spelled - LOG_FIELDS.keys()} == {}
    assert sorted(name for name in LOG_FIELDS.keys() - spelled if not name.endswith(endings)) == []
    assert len(spelled) > 40
    assert not LOG_FIELDS.keys() & (FIXED | logging.makeLogRecord({}).__dict__.keys())


def test_each_line_of_a_request_names_request_and_lease() -> None:
    one = [
        f"{path.name}:{call.lineno}"
        for path, tree in TREES.items()
        if path.parent.name == "work"
        for function in (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call))
        for word in call.keywords
        if word.arg == "extra" and len({"request", "lease"} & set(names(word.value, function))) == 1
    ]
    assert one == []


def record(message: str, level: str = "INFO", name: str = "xim_agent.x", **fields: Any) -> logging.LogRecord:
    number = logging.getLevelNamesMapping()[level]
    return logging.makeLogRecord({"name": name, "levelname": level, "levelno": number, "msg": message, **fields})


def test_one_look_at_the_console_tells_where_a_field_ends() -> None:
    line = log.ConsoleFormatter(False).format(
        record(
            "it happened", model="toy", reason="a sum: 3 GB", path=Path("/a b"), steps=["x y", 2], lease=7, code=None
        )
    )
    assert line[8:] == ' info    x: it happened model=toy reason="a sum: 3 GB" path="/a b" steps=["x y", 2] lease=7'


def test_nobody_writes_a_line_that_passes_for_one_of_ours() -> None:
    nasty = "a\x1b[31m\x1b[2J\r\n12:00:00 info    x: all is well"
    first, second = log.ConsoleFormatter(False).format(record(nasty, reason=nasty)).split("\n")
    assert "\x1b" not in first + second
    assert second == "    12:00:00 info    x: all is well"
    assert first.endswith('all is well"'), "the field is on the first line"
    (line,) = log.JsonFormatter().format(record(nasty, reason=nasty)).split("\n")
    assert json.loads(line)["reason"] == nasty


@pytest.fixture
def kept() -> log.Kept:
    return log.Kept()


def test_the_last_lines_are_kept_and_the_engines_push_out_no_other(kept: log.Kept) -> None:
    kept.emit(record("the one", request="r-1"))
    for number in range(3000):
        kept.emit(record(f"{number} " + "x" * 1000, name=log.VLLM))
    (line,) = kept.agent()
    assert (json.loads(line)["message"], json.loads(line)["request"]) == ("the one", "r-1")
    engine = kept.engine()
    assert json.loads(engine[-1])["message"].startswith("2999 ")
    assert 400 * 1024 < sum(map(len, engine)) <= log.KEPT_BYTES
    kept.emit(record("y" * 2 * log.KEPT_BYTES))
    assert len(kept.agent()) == 1


def test_a_secret_that_became_one_later_is_not_in_what_was_kept(kept: log.Kept) -> None:
    kept.emit(record("told planted-too-late before"))
    log.hide("planted-too-late", kind="salt secret")
    assert "planted-too-late" not in kept.agent()[0]
    assert log.hidden()["planted-too-late"] == "salt secret"


def test_setup_keeps_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    root, logger = logging.getLogger(), logging.getLogger("xim_agent")
    handlers, level, root_level = root.handlers[:], logger.level, root.level
    monkeypatch.setattr(log, "kept", log.Kept())
    try:
        log.setup("info", "json", out := io.StringIO())
        logger.getChild("x").info("shown")
        logger.getChild("x").debug("not shown")
        assert log.kept.agent() == out.getvalue().splitlines()
        assert len(log.kept.agent()) == 1
    finally:
        root.handlers[:] = handlers
        logger.setLevel(level)
        root.setLevel(root_level)
