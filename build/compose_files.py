#!/usr/bin/env python3
"""Writes compose/compose.agent-*.yaml: `.venv/bin/python build/compose_files.py`. A test compares what lies there.

One template for all of them, because each is downloaded alone; the variables are those of xim_agent/config/fields.py.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from xim_agent.cli.options import GROUPS, shown_default
from xim_agent.config.fields import OPTIONS, Config
from xim_agent.outside import longest_stop

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "build" / "compose-agent.yaml.in"
HOME = "/var/lib/inference"
WIDEST = max(len(option.env) for option in OPTIONS)
# As the images have them, so that an empty variable counts as unset: Compose starts again whatever the exit code was.
DEFAULTS = {"XEROTIER_AGENT_VLLM_PATH": "/opt/vllm/bin/vllm", "XEROTIER_AGENT_ON_FINAL_ERROR": "park"}
MARGIN = 5  # seconds a supervisor waits longer than the longest stop

NVIDIA = """    deploy:
      resources:
        reservations:
          devices: [{driver: nvidia, count: all, capabilities: [gpu]}]
"""
AMD = """    devices: [/dev/kfd, /dev/dri]
    group_add: ["${VIDEO_GID:-44}", "${RENDER_GID:-993}"]
"""
MORE = """Needed beyond that, in a file of yours given with a second -f, by:
#   vLLM over several machines (Ray)     network_mode: host
#   InfiniBand, RoCE                     network_mode: host, devices: [/dev/infiniband]"""
CPU_MORE = """Needed beyond that, in a file of yours given with a second -f, by:
#   binding memory to NUMA nodes         cap_add: [SYS_NICE], security_opt: [seccomp=unconfined]"""


@dataclass(frozen=True)
class Stack:
    """One kind of machine. `own`: variables of its file that others lack, with default and meaning."""

    file: str
    image: str
    title: str
    hardware: str = ""
    rights: str = CPU_MORE
    own: tuple[tuple[str, str, str], ...] = ()


GIDS = (
    ("VIDEO_GID", "44", "this machine's gid of the group video: getent group video"),
    ("RENDER_GID", "993", "and of render, which may use /dev/kfd: getent group render"),
)
STACKS = (
    Stack("compose.agent-nvidia.yaml", "xim-vllm-cuda", "for NVIDIA GPUs.", NVIDIA, MORE),
    Stack("compose.agent-amd-rocm.yaml", "xim-vllm-rocm", "for AMD GPUs (ROCm).", AMD, MORE, GIDS),
    Stack("compose.agent-amd-cpu-zendnn.yaml", "xim-vllm-zendnn", "for AMD CPUs (ZenDNN)."),
    Stack("compose.agent-cpu.yaml", "xim-vllm-cpu", "for CPUs of any make."),
)


def grace() -> int:
    """Seconds for `stop_grace_period`."""
    return round(longest_stop(Config().drain_timeout_seconds)) + MARGIN


def own(stack: Stack) -> tuple[tuple[str, str, str], ...]:
    """Variables that are not the agent's own settings."""
    return (
        ("DOCKER_REGISTRY", "ghcr.io/xerotier/container-agents", "what stands before the image's name"),
        ("VERSION", "latest", "the image's tag"),
        ("MODELS_DIR", "/data/xerotier/models", "on this machine: the model cache, of uid 5152"),
        ("CONFIG_DIR", "/data/xerotier/config", "on this machine: the enrollment, of uid 5152, mode 700"),
        ("SHM_SIZE", "90g", "most of /dev/shm (16g up to 8B parameters, 32g up to 34B); or in bytes"),
        (
            "XEROTIER_AGENT_STOP_GRACE",
            f"{grace()}s",
            f"at least DRAIN_TIMEOUT_SECONDS + {grace() - round(Config().drain_timeout_seconds)}",
        ),
        *stack.own,
    )


def options() -> str:
    """Every setting of the agent, as the comment of a file's header."""
    lines = []
    for group, title in GROUPS.items():
        lines.append(f"# {title}")
        for option in (o for o in OPTIONS if o.meta["group"] == group):
            default = DEFAULTS.get(option.env) or shown_default(option).replace("~", HOME)
            choices = f": {', '.join(option.choices)}" if option.choices else ""
            lines.append(row(option.env, f"{option.meta['help']}{choices} [{default}]", WIDEST))
    return "\n".join(lines)


def row(name: str, meaning: str, widest: int) -> str:
    first = f"#   {name:<{widest}}  "
    return textwrap.fill(meaning, 124, initial_indent=first, subsequent_indent="#".ljust(len(first)))


def environment() -> str:
    # Else without a value: what is not set is not in there.
    values = {name: f" ${{{name}:-{value}}}" for name, value in DEFAULTS.items()}
    return "\n".join(f"      {option.env}:{values.get(option.env, '')}" for option in OPTIONS)


def text(stack: Stack) -> str:
    """The whole file."""
    longest = max(len(name) for name, _, _ in own(stack))
    words = {
        "FOR": stack.title,
        "FILE": stack.file,
        "PROJECT": stack.file.removeprefix("compose.").removesuffix(".yaml").replace("agent", "xim-agent"),
        "IMAGE": stack.image,
        "DOCKERFILE": f"build/images/{stack.image}.Dockerfile",
        "RIGHTS": stack.rights,
        "OWN": "\n".join(row(name, f"{meaning} [{value}]", longest) for name, value, meaning in own(stack)),
        "OPTIONS": options(),
        "BEYOND": str(round(longest_stop(0))),
        "GRACE": str(grace()),
        "HARDWARE": stack.hardware,
        "HOME": HOME,
        "ENVIRONMENT": environment(),
    }
    made = TEMPLATE.read_text()
    for word, value in words.items():
        made = made.replace(f"@{word}@", value)
    return made


if __name__ == "__main__":
    for stack in STACKS:
        (ROOT / "compose" / stack.file).write_text(text(stack))
