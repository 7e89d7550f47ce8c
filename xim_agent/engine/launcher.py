"""The vLLM installation behind VLLM_PATH: where it is, which version, which flags it knows."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from xim_agent.errors import AgentError, Exit


def find(vllm_path: str, environ: Mapping[str, str]) -> Path:
    """Absolute path of the launcher. Raises AgentError `launcher_missing`."""
    found = None
    with suppress(RuntimeError):  # ~nobody
        found = shutil.which(str(Path(vllm_path).expanduser()), path=environ.get("PATH", os.defpath))
    if found is None:
        raise AgentError(
            "launcher_missing",
            f"there is no vLLM at {vllm_path!r}",
            hint="install vLLM, or set XEROTIER_AGENT_VLLM_PATH to its `vllm` program",
            exit_code=Exit.CONFIG,
        )
    return Path(found).absolute()


def identity(launcher: Path) -> str:
    """Changes when the installation does: path, size and mtime of the launcher."""
    stat = launcher.stat()
    return hashlib.sha256(f"{launcher}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:16]


def version(launcher: Path) -> str:
    """vLLM's version from the metadata beside the launcher's Python, without starting it (that takes 10 s and more);
    the launcher's identity when it is not a Python environment's script. Names the compile caches."""
    for info in _beside(launcher, "vllm*.dist-info"):
        if found := re.fullmatch(r"vllm(?:_cpu)?-([\w.+!-]+)\.dist-info", info.name):
            return found[1]
    return identity(launcher)


def has_bitsandbytes(launcher: Path) -> bool:
    """Whether this vLLM can be told `--quantization bitsandbytes`, by its files; False when they are not found."""
    return bool(_beside(launcher, "vllm/model_executor/layers/quantization/bitsandbytes.py"))


def _beside(launcher: Path, pattern: str) -> list[Path]:
    found: list[Path] = []
    with suppress(OSError):
        for directory in {launcher.parent, launcher.resolve().parent}:
            found += sorted((directory.parent / "lib").glob(f"python3*/site-packages/{pattern}"))
    return found


def load_flags(cache: Path, launcher: Path) -> frozenset[str] | None:
    """Flags learnt from this launcher earlier; None when there are none of this installation."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(cache.read_text())
        if kept["launcher"] == identity(launcher):
            return frozenset(kept["flags"])
    return None


def save_flags(cache: Path, launcher: Path, flags: frozenset[str]) -> None:
    with suppress(OSError):
        temporary = cache.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"launcher": identity(launcher), "flags": sorted(flags)}))
        temporary.replace(cache)
