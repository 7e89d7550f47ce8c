"""The shipped Compose files, as the real Compose reads them."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "compose"
BIN = Path(sys.executable).parent


def compose(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`docker compose` with these variables and nothing else of this machine's."""
    own = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | (env or {})
    command = [str(BIN / "docker-compose"), *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=60, check=False)


def rendered(*files: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The configuration that these files of compose/ (or absolute paths) give together."""
    found: dict[str, Any] = json.loads(_text(files, tuple((env or {}).items())))
    return found


@cache
def _text(files: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> str:
    named = [word for file in files for word in ("-f", str(PLACE / file))]
    done = compose(*named, "config", "--format", "json", env=dict(env))
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_module(name: str) -> ModuleType:
    """A script of build/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "build" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
