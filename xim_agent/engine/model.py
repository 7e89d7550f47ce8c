"""Reads a model directory: config.json and the headers of its safetensors files, never the weights."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from xim_agent.engine.facts import ModelFacts, Weights, facts, weigh
from xim_agent.errors import AgentError, Exit

_LONGEST_HEADER = 100 * 1024 * 1024  # the format's own limit
_MOST = 1 << 48  # more bytes, tokens or layers than any model has; sums of such numbers still fit a float


def read_model(directory: Path) -> ModelFacts:
    """Blocking. Raises AgentError `model_unreadable` when there is no usable config.json, no weights, or a header is
    broken."""
    try:
        if not (directory / "config.json").exists():
            raise ValueError("there is no config.json")
        config = json.loads((directory / "config.json").read_bytes())
        files = _served(directory)
        weights = weigh(map(_header, files), config) if files else Weights(_pickled(directory))
        return _checked(facts(config, weights))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AgentError(
            "model_unreadable",
            f"{directory} is not a model that vLLM can serve: {error if type(error) is ValueError else repr(error)}",
            hint="a model directory holds config.json, *.safetensors and the tokenizer's files",
            exit_code=Exit.CONFIG,
        ) from error


def _checked(model: ModelFacts) -> ModelFacts:
    """The files come from outside: what sizing computes with has the type and the size that it expects."""
    names: tuple[object, ...] = (model.architecture, model.quantization or "")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("architectures or quantization_config name no text")
    if wild := [n for n in astuple(model) if isinstance(n, int | float) and not 0 <= n <= _MOST]:
        raise ValueError(f"{wild[0]!r} is out of range")
    return model


def _served(directory: Path) -> list[Path]:
    """The files that vLLM loads: of Mistral's `consolidated` copy and the layout of Hugging Face the former, then only
    those that the index names."""
    files = sorted(directory.glob("*.safetensors"))
    consolidated = [path for path in files if path.name.startswith("consolidated")]
    index = directory / f"{'consolidated' if consolidated else 'model'}.safetensors.index.json"
    files = consolidated or files
    if not index.is_file():
        return files
    named = set(json.loads(index.read_bytes())["weight_map"].values())
    if missing := named - {path.name for path in files}:
        raise ValueError(f"{index.name} names {min(map(str, missing))}, which is not there")
    return [path for path in files if path.name in named]


def _pickled(directory: Path) -> int:
    """Bytes of PyTorch's own files, which the cache lets in with ALLOW_UNSAFE_FILES only, and vLLM reads last."""
    for pattern in ("*.bin", "*.pt"):
        if found := sum(path.stat().st_size for path in directory.glob(pattern)):
            return found
    raise ValueError("it holds no weights (*.safetensors)")


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _LONGEST_HEADER:
            raise ValueError(f"{path.name}: header of {length} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path.name}: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: its header is no object")
    return header
