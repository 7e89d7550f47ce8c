"""A plan for people and programs: the command line, what the environment gains, and the sums. Secrets masked; pure."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from xim_agent.config.mask import HIDDEN, masked_arguments
from xim_agent.engine.budget import Term
from xim_agent.engine.command import Plan
from xim_agent.hardware.document import to_document
from xim_agent.hardware.report import Hardware

SCHEMA = 1  # raised when a member goes or changes its meaning


def document(
    plan: Plan,
    hardware: Hardware,
    *,
    directory: str,
    vllm_version: str | None,
    flags_checked: bool,
    secret: Collection[str],
) -> dict[str, Any]:
    """What `plan --json` prints. `secret`: names of variables whose values are not shown. `vllm_version` None: there is
    no vLLM here. Sizes in bytes, of one rank where nothing else is said."""
    sizing, wishes = plan.sizing, plan.wishes
    environment = {name: HIDDEN if name in secret else value for name, value in plan.env.items()}
    return {
        "schema": SCHEMA,
        "command": list(masked_arguments(plan.argv)),
        "environment": environment,
        "vllm": {"path": plan.argv[0], "version": vllm_version, "flags_checked": flags_checked},
        "model": {"directory": directory, "task": plan.task, **asdict(plan.model)},
        "max_model_len": (sizing and sizing.max_model_len) or wishes.max_model_len or plan.model.max_len or None,
        "max_num_seqs": plan.max_num_seqs,
        "max_concurrent": plan.ceiling,
        "tensor_parallel_size": wishes.tensor_parallel,
        "pipeline_parallel_size": wishes.pipeline_parallel,
        "gpu_memory_utilization": sizing.utilization if sizing else None,
        "quantization": (sizing.quantization if sizing else wishes.quantization) or plan.model.quantization,
        "kv_cache_bytes": sizing.kv_bytes if sizing else None,
        "kv_offload_bytes": sizing.offload_bytes if sizing else None,
        "sums": [asdict(term) for term in sizing.terms] if sizing else [],
        "warnings": list(plan.warnings),
        "hardware": to_document(hardware),
    }


def script(found: Mapping[str, Any]) -> str:
    """The document as lines for a shell, which can be pasted: sums and warnings are comments."""
    model, vllm, hardware = found["model"], found["vllm"], found["hardware"]
    devices = [device["name"] for device in hardware["devices"]] or [hardware["cpu"]["model"]]
    kinds = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    sums = [Term(**term) for term in found["sums"]]
    width = max((len(term.text) for term in sums), default=0)
    lines = [f"{model['architecture']} ({model['task']}) on {kinds}"]
    lines += [f"  {term.text:<{width}} {term.amount:>18}" for term in sums]
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    if vllm["version"] is None:
        lines.append(f"not checked: there is no vLLM at {vllm['path']}")
    elif not vllm["flags_checked"]:
        lines.append(f"vLLM {vllm['version']} has not been asked yet which flags it knows")
    if any(HIDDEN in word for word in (*found["command"], *found["environment"].values())):
        lines.append(f"{HIDDEN} stands for a value that may be secret")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in found["environment"].items()]
    return "\n".join([*(f"# {_one_line(line)}" for line in lines), *exports, shlex.join(found["command"])])


def _one_line(text: str) -> str:
    """Names come from files: none of them ends the comment."""
    return "".join(c if c.isprintable() else "?" for c in text)
