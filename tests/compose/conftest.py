"""The shipped files, really brought up: on a Docker daemon of the tests' own, with images that stand in for ours.

The stand-ins have what build/images gives (user, directories, entrypoint, health check) and this machine's vLLM instead
of one of their own; building the real ones is tested elsewhere.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import debian
from fakes.compose_up import REGISTRY
from fakes.docker import Docker, daemon, data_root

LIBRARIES = ("ca-certificates", "libbz2-1.0", "libffi8", "liblzma5", "libnuma1", "libsqlite3-0", "libssl3", "zlib1g")
DOCKERFILE = """FROM xim-test/base
COPY onedir /opt/xerotier
RUN chmod 755 /root && groupadd --gid 5152 inference && mkdir -p /opt/vllm/bin && ln -s {vllm} /opt/vllm/bin/vllm \
 && useradd --uid 5152 --gid 5152 --home-dir /var/lib/inference --no-create-home inference \
 && install -d -o 5152 -g 5152 -m 0750 /var/lib/inference /var/lib/inference/.cache /var/lib/inference/.config \
 && install -d -o 5152 -g 5152 -m 0700 /var/lib/router /var/lib/inference/.config/xerotier \
    /var/lib/inference/.cache/xerotier /var/lib/inference/.cache/xerotier/models
ENV HOME=/var/lib/inference LANG=C.UTF-8 PATH=/opt/xerotier:/usr/sbin:/usr/bin:/sbin:/bin
USER 5152:5152
HEALTHCHECK --interval=1s --timeout=10s --start-period=600s CMD {check}
ENTRYPOINT {entrypoint}
"""
CHECKS = {
    "xim-vllm-cpu": ["xerotier-xim-agent", "healthcheck"],
    "xim-router": ["bash", "-c", ": </dev/tcp/127.0.0.1/8080"],
}


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory, agent_onedir: Path, vllm_launcher: str) -> Iterator[Docker]:
    place = tmp_path_factory.mktemp("compose")
    with data_root(place) as data, daemon(data) as docker:
        docker.load(debian.archive(*LIBRARIES), "xim-test/base")
        context = place / "context"
        shutil.copytree(agent_onedir.parent, context / "onedir")
        for name, check in CHECKS.items():
            words = ["xerotier-xim-agent", "router" if name == "xim-router" else "run"]
            text = DOCKERFILE.format(vllm=vllm_launcher, check=json.dumps(check), entrypoint=json.dumps(words))
            (context / "Dockerfile").write_text(text)
            docker("build", "-t", f"{REGISTRY}/{name}", str(context))
        yield docker


@pytest.fixture(scope="session")
def engine_mounts(vllm_launcher: str) -> list[str]:
    """This machine's vLLM and its Python, at the same paths."""
    python = Path(vllm_launcher).with_name("python")
    code = "import sys; print(sys.prefix, sys.base_prefix, sep='\\n')"
    places = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split("\n")[:2]
    return [f"{place}:{place}:ro" for place in places]
