"""Rules of the code that a reader relies on: what is pure, what may import what, where tasks begin, how long it is.

Each test collects every violation, so that one run shows all of them.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent / "xim_agent"

# Pure: what goes in is passed in, what comes out is returned. No clock, randomness, file, socket, log or task.
PURE = {
    *("outcome", "backoff", "text", "config.fields", "config.config", "config.mask"),
    *("hardware.report", "hardware.document", "hardware.visible", "hardware.xid", "hardware.look", "engine.preview"),
    *("identity.join_key", "identity.claims", "identity.rotation", "assignment.plan", "cache.manifest", "cache.plan"),
    *("engine.facts", "engine.budget", "engine.sizing", "engine.arguments", "engine.command", "engine.state"),
    *("engine.failures", "engine.oom", "engine.reader", "engine.salt"),
    *("engine.liveness", "engine.poison", "hardware.memory"),
    *("work.lease", "work.batch", "work.outbox", "work.capacity"),
    *("mesh.messages", "mesh.codec", "mesh.trace", "mesh.exchange", "metrics.names"),
    *("metrics.histogram", "metrics.openmetrics", "work.times", "router.times"),
    *("router.tokens", "router.dispatch", "router.ending"),
    *("doctor.report", "doctor.identity", "doctor.network", "doctor.machine"),
}
IMPURE_STDLIB = {
    *("asyncio", "concurrent", "fcntl", "ftplib", "glob", "http", "logging", "mmap", "multiprocessing", "os"),
    *("random", "resource", "secrets", "select", "selectors", "shutil", "socket", "socketserver", "sqlite3"),
    *("ssl", "subprocess", "tempfile", "threading", "time", "urllib", "uuid"),
}
PURE_STDLIB = (sys.stdlib_module_names - IMPURE_STDLIB) | {"urllib.parse"}
PURE_LIBRARIES = {"msgspec", "cryptography", "h11", "jwt", "zstandard"}
FILE_IO = {
    *(
        "exists",
        "glob",
        "is_dir",
        "is_file",
        "iterdir",
        "lstat",
        "mkdir",
        "open",
        "read_bytes",
        "read_text",
        "readlink",
    ),
    *("rename", "resolve", "rglob", "rmdir", "stat", "symlink_to", "touch", "unlink", "write_bytes", "write_text"),
}
CLOCKS = {"now", "today", "utcnow"}  # of datetime

SHARED = {"errors", "outcome", "backoff", "clock", "watch", "health", "files", "text", "prctl", "log", "heap"}
WIRING = {"agent", "assemble", "outside", "__main__"}
NURSERIES = {
    *("agent", "cli.local", "cli.park", "cli.router", "cli.run", "engine.process", "cache.download", "cache.service"),
    *("work.sender", "metrics.server", "control.server", "router.app", "router.endpoint", "cli.doctor_look"),
}
FORK = {"engine.guard"}
GUARDS = {"work.request", "cli.render", "router.server", "engine.streams"}
FOREIGN_MODULES = {"asyncio", "anyio", "concurrent", "multiprocessing"}
FOREIGN_CALLS = {"threading.Thread", "threading.Timer", "time.sleep", "os.system", "os.popen"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_THE_TREE = 300, 60, 120


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text())


def nodes(name: str) -> Iterator[ast.AST]:
    return ast.walk(tree(name))


@cache
def imports(name: str) -> frozenset[tuple[str, int]]:
    """Full names of imported modules with their lines; `from xim_agent.a import b` is a.b when that is a file."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("xim_agent.")
                is_file = base.startswith("xim_agent") and inner in FILES
                found.add((f"xim_agent.{inner}" if is_file else base, node.lineno))
    return frozenset(found)


def own_imports(name: str) -> Iterator[tuple[str, int]]:
    for module, line in imports(name):
        if module.startswith("xim_agent."):
            yield module.removeprefix("xim_agent."), line


@cache
def impurities(name: str) -> tuple[str, ...]:
    """Why a file is not pure; empty when it is."""
    found = []
    for module, line in sorted(imports(name)):
        top = module.split(".")[0]
        if top == "xim_agent":
            other = module.removeprefix("xim_agent.")
            if other in FILES and other != name and impurities(other):
                found.append(f"{name}:{line} imports {other}, which is not pure")
        elif module not in PURE_STDLIB and top not in PURE_STDLIB | PURE_LIBRARIES:
            found.append(f"{name}:{line} imports {module}")
    for node in nodes(name):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in FILE_IO | CLOCKS:
                found.append(f"{name}:{node.lineno} calls .{called.attr}()")
            elif isinstance(called, ast.Name) and called.id in {"open", "print", "input"}:
                found.append(f"{name}:{node.lineno} calls {called.id}()")
    return tuple(found)


def test_pure_files_are_pure() -> None:
    assert not [name for name in PURE if name not in FILES]
    assert not [why for name in PURE for why in impurities(name)]


def test_only_pure_files_cross_folders() -> None:
    wrong = []
    for name in FILES:
        folder = name.split(".")[0]
        if name in WIRING or folder == "cli" or "." not in name:
            continue
        for other, line in own_imports(name):
            crosses = other.split(".")[0] != folder
            if crosses and other not in SHARED and (other not in FILES or "." not in other or impurities(other)):
                wrong.append(f"{name}:{line} imports {other}")
    assert not wrong


def test_nobody_imports_the_wiring_but_the_command_line() -> None:
    outside = [n for n in FILES if n not in WIRING and not n.startswith("cli.")]
    assert not [f"{n}:{line}" for n in outside for o, line in own_imports(n) if o in WIRING or o.startswith("cli")]


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Dotted names of what is called, with the call."""
    for node in nodes(name):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_tasks_begin_only_where_the_list_says() -> None:
    places = {name for name in FILES for called, _ in calls(name) if called.endswith("open_nursery")}
    assert places <= NURSERIES


def test_only_the_guard_forks() -> None:
    forks = {"os.fork", "os.forkpty", "os.posix_spawn", "pty.fork"}
    assert {name for name in FILES for called, _ in calls(name) if called in forks} <= FORK


def test_no_other_concurrency_than_trios() -> None:
    used = [f"{n}:{line} imports {m}" for n in FILES for m, line in imports(n) if m.split(".")[0] in FOREIGN_MODULES]
    called = [
        f"{name}:{call.lineno} calls {function}"
        for name in FILES
        for function, call in calls(name)
        if function in FOREIGN_CALLS or function.startswith("subprocess.")
    ]
    assert not used + called


def test_shields_have_a_deadline() -> None:
    bare = [
        f"{name}:{call.lineno}"
        for name in FILES
        for called, call in calls(name)
        if called.endswith("CancelScope")
        and any(k.arg == "shield" for k in call.keywords)
        and not any(k.arg in {"deadline", "relative_deadline"} for k in call.keywords)
    ]
    assert not bare


def test_nothing_swallows_every_exception_but_the_guards() -> None:
    broad = [
        f"{name}:{node.lineno}"
        for name in FILES
        if name not in GUARDS
        for node in nodes(name)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & set(ast.unparse(node.type).strip("()").split(", ")))
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    ]
    assert not broad


def lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    length = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        length -= (first.end_lineno or 0) - first.lineno + 1
    return length


def test_files_and_functions_are_short() -> None:
    long = [
        f"{name}: {n} lines" for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > MOST_LINES
    ]
    long += [
        f"{name}:{node.lineno} {node.name}: {n} lines"
        for name in FILES
        for node in nodes(name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (n := lines_without_docstring(node)) > MOST_LINES_OF_A_FUNCTION
    ]
    assert not long


def test_the_tree_fits_one_look() -> None:
    assert len(FILES["agent"].read_text().splitlines()) <= MOST_LINES_OF_THE_TREE
