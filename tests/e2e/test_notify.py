"""The executable under something that listens as systemd does: what it says of itself from its start to its end."""

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fakes.stack import Stack, running

from xim_agent.outside import SPARE_SECONDS, longest_stop

pytestmark = pytest.mark.e2e
FAKE_VLLM = Path(__file__).parents[1] / "fakes" / "fake_vllm.py"


@pytest.fixture
def stack(agent_onedir: Path, toy_model: Path, tmp_path: Path) -> Iterator[Stack]:
    with running(Stack(str(agent_onedir), str(FAKE_VLLM), toy_model, tmp_path)) as made:
        yield made


def test_what_systemd_hears(stack: Stack) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        systemd.bind(str(stack.root / "notify"))
        systemd.settimeout(60)

        def hear(begin: str) -> str:
            """The next message that begins so. Each must come from the process that was started."""
            while True:
                data, [(_, _, credentials)], _, _ = systemd.recvmsg(4096, socket.CMSG_SPACE(12))
                assert stack.agent is not None
                assert struct.unpack("3i", credentials)[0] == stack.agent.popen.pid
                if (text := data.decode()).startswith(begin):
                    return text

        stack.start_agent(
            XEROTIER_AGENT_JOIN_KEY=stack.join_key,
            XEROTIER_AGENT_DRAIN_TIMEOUT_SECONDS="1000",
            NOTIFY_SOCKET=str(stack.root / "notify"),
            WATCHDOG_USEC="3000000",
        )
        assert stack.agent is not None
        assert hear("STATUS=").startswith("STATUS=not enrolled; model none; engine stopped")
        hear("READY=1")
        stack.wait_ready(60)
        hear("STATUS=ready; model toy ")
        hear("WATCHDOG=1")
        stack.agent.popen.send_signal(signal.SIGHUP)
        hear("RELOADING=1\nMONOTONIC_USEC=")
        hear("READY=1")
        engine = stack.agent.named(str(FAKE_VLLM)).environ()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(engine)
        stack.agent.popen.terminate()
        assert hear("STOPPING=1") == f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(longest_stop(1000) + SPARE_SECONDS) * 1e6:.0f}"
        assert stack.agent.wait(60) == 0
        stack.agent = None


def test_without_a_credential_it_is_never_ready(agent_onedir: Path, tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(tmp_path / "notify")}
        env["XEROTIER_AGENT_METRICS_PORT"] = "0"
        done = subprocess.run([str(agent_onedir), "run"], env=env, capture_output=True, timeout=60, check=False)
        assert done.returncode == 78, done.stderr
        heard = []
        while True:
            try:
                heard.append(systemd.recv(4096).decode())
            except BlockingIOError:
                break
        assert heard
        assert not [text for text in heard if not text.startswith("STATUS=not enrolled")]
