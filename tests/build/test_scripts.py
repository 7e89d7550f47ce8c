"""The shell scripts, in a checkout where everything that they start is a stand-in."""

import importlib.machinery
import importlib.util
import shutil
import subprocess
import urllib.request
from http.client import BadStatusLine
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError

import pytest

BUILD = Path(__file__).parents[2] / "build"
PATH = "/usr/bin:/bin"


def script(path: Path, text: str, first: str = "#!/bin/sh") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{first}\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Its path holds a space. The agent prints its arguments, one a line; engine-env makes a Python, says `cpu`."""
    root = tmp_path / "check out"
    script(root / "build/agent-env", "")
    script(root / "build/engine-env", "echo cpu")
    script(root / ".venv/bin/xerotier-xim-agent", 'printf "%s\\n" "$@"')
    python(root / ".venv-engine/bin/python", "own")
    shutil.copy2(BUILD / "try", root / "build/try")
    return root


def python(path: Path, name: str, lacks: str = "") -> Path:
    """Stands for an interpreter that has all modules but `lacks`, and makes the demo model `name`."""
    return script(path, f'case "$1 $2" in -c*\\"{lacks or "nothing"}\\"*) exit 1;; -c*) ;; *) echo {name};; esac')


def tried(checkout: Path, *arguments: str, vllm: Path | None = None) -> list[str]:
    env = {"PATH": PATH} | ({"XEROTIER_AGENT_VLLM_PATH": str(vllm)} if vllm else {})
    command = [checkout / "build/try", *arguments]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], ["--model", "own"]),
        (["--once", "what does --model do"], ["--model", "own", "--once", "what does --model do"]),
        (["--once", "and --help ?"], ["--model", "own", "--once", "and --help ?"]),
        (["--model", "a b"], ["--model", "a b"]),
        (["--port", "1", "--model=x"], ["--port", "1", "--model=x"]),
        (["-h"], ["--help"]),
        (["--port", "1", "--help"], ["--help"]),
    ],
)
def test_try_makes_the_demo_model_only_where_none_is_named(
    checkout: Path, arguments: list[str], given: list[str]
) -> None:
    assert tried(checkout, *arguments) == ["local", *given]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("#!{python}", "import sys"),
        ("#! {python} -I", "import sys"),
        ("#!/bin/sh", '\'\'\'exec\' "{python}" "$0" "$@"'),
        ("#!/bin/sh", "'''exec' {python} \"$0\" \"$@\""),
        ("#!/bin/sh", "'''exec' '{python}' \"$0\" \"$@\""),
    ],
)
def test_try_finds_the_python_that_a_launcher_elsewhere_names(
    checkout: Path, tmp_path: Path, first: str, second: str
) -> None:
    folder = "with space" if "exec' \"" in second else "long"
    named = python(tmp_path / folder / "bin/python3.12", "named")
    launcher = script(tmp_path / "copied/vllm", second.format(python=named), first.format(python=named))
    assert tried(checkout, vllm=launcher) == ["local", "--model", "named"]


def test_try_looks_beside_what_a_link_leads_to(checkout: Path, tmp_path: Path) -> None:
    python(tmp_path / "tool/bin/python", "beside")
    script(tmp_path / "tool/bin/vllm", "", "#!/usr/bin/env python3")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/vllm").symlink_to("../tool/bin/vllm")
    assert tried(checkout, vllm=tmp_path / "bin/vllm") == ["local", "--model", "beside"]


@pytest.mark.parametrize("lacks", ["pip", "gguf"])
def test_try_takes_its_own_python_where_that_of_the_launcher_cannot_make_the_model(
    checkout: Path, tmp_path: Path, lacks: str
) -> None:
    found = python(tmp_path / "uv/bin/python", "foreign", lacks)
    assert tried(checkout, vllm=script(tmp_path / "uv/bin/vllm", "", f"#!{found}")) == ["local", "--model", "own"]


@pytest.mark.parametrize(("user", "says"), [("0", "apt-get install -y"), ("7", "apt-get install g++ binutils")])
def test_the_test_script_installs_what_the_system_lacks_or_names_it(tmp_path: Path, user: str, says: str) -> None:
    (tmp_path / "root/build").mkdir(parents=True)
    shutil.copy2(BUILD / "test", tmp_path / "root/build/test")
    tools = tmp_path / "bin"
    script(tools / "id", f"echo {user}")
    script(tools / "apt-get", 'echo "apt-get $*"; [ "$1" = update ]')
    (tools / "dirname").symlink_to("/usr/bin/dirname")
    command = ["/bin/bash", tmp_path / "root/build/test"]
    done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stdout + done.stderr
    assert "g++ binutils python3-venv python3-dev systemd chromium" in done.stdout + done.stderr
    assert ("apt-get update" in done.stdout) == (user == "0")


def loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of build/ as a module."""
    monkeypatch.syspath_prepend(str(BUILD))
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(BUILD / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    loader.exec_module(module)
    return module


@pytest.fixture
def engine_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded("engine-env", monkeypatch)


@pytest.mark.parametrize("error", [URLError("no name"), TimeoutError(), ConnectionResetError(), BadStatusLine("x")])
def test_an_index_that_cannot_be_reached_is_done_without_and_said(
    engine_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert engine_env.cpu_index() == []
    assert "pip's own index" in capsys.readouterr().err


def test_the_engine_is_repaired_where_the_path_holds_a_space(
    engine_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site = tmp_path / "a b"
    site.mkdir()
    monkeypatch.setattr(engine_env, "run", lambda command: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{site} 1.2\n"))
    engine_env.repair(tmp_path)
    assert (site / "vllm-1.2+cpu.dist-info/METADATA").exists()


@pytest.mark.parametrize(
    ("sent", "says"), [(None, "cannot be fetched"), (b"something else", "nothing is taken from it")]
)
def test_axe_comes_as_it_was_published_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: bytes | None, says: str
) -> None:
    axe, package = loaded("axe", monkeypatch), tmp_path / "package.tgz"
    if sent is not None:
        package.write_bytes(sent)
    monkeypatch.setattr(axe, "URL", package.as_uri())
    with pytest.raises(SystemExit) as refused:
        axe.main(tmp_path / "axe.min.js")
    assert says in str(refused.value.code)
    assert not (tmp_path / "axe.min.js").exists()
