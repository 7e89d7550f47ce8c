"""How an agent is started with a new join key: the commands of README.md and packaging/README.md, with the key. Pure.

The key is pasted into a file, which leaves it in no shell history and not in `docker inspect`.
"""

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

COMPOSE = {
    "compose.agent-nvidia.yaml": "NVIDIA GPUs",
    "compose.agent-amd-rocm.yaml": "AMD GPUs (ROCm)",
    "compose.agent-amd-cpu-zendnn.yaml": "AMD CPUs (ZenDNN)",
    "compose.agent-cpu.yaml": "other CPUs",
}
INSECURE = "XEROTIER_AGENT_ALLOW_INSECURE=true"
_PASTE = "Paste the key, Enter, Ctrl-D:"
_THEN = "Once it has joined, no start needs the key again"


def insecure(urls: Sequence[str]) -> bool:
    """Whether an agent must be told that plain http is all right: it has no other way in, and may be elsewhere."""
    return all(url.startswith("http://") for url in urls) and not only_here(urls)


def only_here(urls: Sequence[str]) -> bool:
    """Whether these are addresses of the router's own machine for itself."""
    hosts = [urlsplit(url).hostname or "" for url in urls]
    return all(host == "localhost" or host == "::1" or host.startswith("127.") for host in hosts)


def ways(key: str, urls: Sequence[str]) -> list[dict[str, Any]]:
    """`id`, `name`, `note` (may be empty) and `steps`, each with `say` and `command`, or `say` and `paste`."""
    plain, here = insecure(urls), only_here(urls)
    found = [
        {
            "id": file.removeprefix("compose.agent-").removesuffix(".yaml"),
            "name": f"Docker Compose: {machine}",
            "note": f"A container cannot reach {urls[0]}, which means itself: give the router a --public-url first."
            if here
            else "",
            "steps": list(_compose(file, key, plain)),
        }
        for file, machine in COMPOSE.items()
    ]
    elsewhere = f"{urls[0]} leads to the router from its own machine only." if here else ""
    systemd = {"id": "systemd", "name": "systemd, from a package", "steps": list(_systemd(key, plain))}
    bare = {"id": "bare", "name": "The bare executable", "steps": list(_bare(key, plain))}
    return [*found, {**systemd, "note": elsewhere}, {**bare, "note": elsewhere}]


def _step(say: str, *commands: str) -> dict[str, str]:
    return {"say": say, "command": "\n".join(commands)}


def _paste(key: str) -> dict[str, str]:
    return {"say": _PASTE, "paste": key}


def _compose(file: str, key: str, plain: bool) -> Iterator[dict[str, str]]:
    yield _step(
        "Make the agent's directories, and a file for the key:",
        "sudo install -d -m 700 -o 5152 -g 5152 /data/xerotier/models /data/xerotier/config",
        "sudo install -m 600 -o 5152 -g 5152 /dev/stdin /data/xerotier/config/join-key",
    )
    yield _paste(key)
    yield _step(
        "In a checkout of the agent, build the image and start it:",
        "cd compose",
        "echo XEROTIER_AGENT_JOIN_KEY_FILE=/var/lib/inference/.config/xerotier/join-key >> .env",
        *([f"echo {INSECURE} >> .env"] if plain else []),
        f"docker compose -f {file} build",
        f"docker compose -f {file} up -d",
        f"docker compose -f {file} logs -f agent",
    )
    yield _step(f"{_THEN}:", "sudo rm /data/xerotier/config/join-key")


def _systemd(key: str, plain: bool) -> Iterator[dict[str, str]]:
    yield _step("Make a file for the key:", "sudo install -m 0600 /dev/stdin /etc/xerotier/join-key")
    yield _paste(key)
    if plain:
        yield _step("Allow plain http:", f"echo {INSECURE} | sudo tee -a /etc/xerotier/xim-agent.env")
    yield _step(
        "Look at the settings, and start it:",
        "sudo editor /etc/xerotier/xim-agent.env",
        "sudo systemctl enable --now xerotier-xim-agent",
    )
    yield _step(f"{_THEN}:", "sudo rm /etc/xerotier/join-key")


def _bare(key: str, plain: bool) -> Iterator[dict[str, str]]:
    yield _step("Make a file for the key:", "install -m 0600 /dev/stdin join-key")
    yield _paste(key)
    run = "XEROTIER_AGENT_JOIN_KEY_FILE=join-key XEROTIER_AGENT_VLLM_PATH=/opt/vllm/bin/vllm xerotier-xim-agent run"
    yield _step("Start it, with the path of your vLLM:", f"{run} --insecure" if plain else run)
    yield _step(f"{_THEN}:", "rm join-key")
