"""Docker, Compose, the toolkit and systemctl as scripts that say what the real ones say."""

from pathlib import Path

import pytest
import trio

from xim_agent.doctor import tools
from xim_agent.doctor.report import Finding
from xim_agent.outside import longest_stop


class Host:
    """`root` is an empty machine; each script put into `bin` is a tool of it."""

    def __init__(self, path: Path) -> None:
        self.root, self.bin = path / "root", path / "bin"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("cat", "sleep"):  # /bin itself may hold a real docker
            (self.bin / name).symlink_to(f"/bin/{name}")

    def tool(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def docker(self, version: str = "28.2.2", compose: str = "2.24.5", seen: str = "") -> None:
        self.tool("docker", f"""case "$1" in
--version) echo "Docker version {version}, build e6534b4";;
compose) {f'echo "Docker Compose version v{compose}"' if compose else "exit 1"};;
ps) {"echo 1a2b3c" if seen else ":"};;
inspect) [ "$4" = 1a2b3c ] && echo '{seen}';;
esac""")  # fmt: skip

    def systemd(self, shown: str) -> None:
        (self.root / "run/systemd/system").mkdir(parents=True)
        self.tool("systemctl", f"cat <<'END'\n{shown}\nEND")

    def versions(self, nvidia: bool = False) -> dict[str, Finding]:
        found = trio.run(tools.versions, {"PATH": str(self.bin)}, self.root, nvidia)
        return {finding.check: finding for finding in found}

    def drain(self, seconds: float = 120) -> Finding:
        return trio.run(tools.drain, {"PATH": str(self.bin)}, self.root, longest_stop(seconds))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_is_not_installed_is_not_needed(host: Host) -> None:
    found = host.versions(nvidia=True)
    assert {finding.status for finding in found.values()} == {"skipped"}
    assert found.keys() == {"docker", "compose", "toolkit"}


def test_a_container_is_told_nothing_of_its_host(host: Host) -> None:
    host.docker("20.10.1")
    (host.root / ".dockerenv").touch()
    assert {finding.status for finding in host.versions().values()} == {"skipped"}


def test_versions_that_will_do(host: Host) -> None:
    host.docker("24.0.0", "2.20.0")
    host.tool("nvidia-ctk", 'echo "NVIDIA Container Toolkit CLI version 1.14.0"; echo "commit: x"')
    texts = {name: (finding.status, finding.text) for name, finding in host.versions(nvidia=True).items()}
    assert texts == {
        "docker": ("ok", "Docker 24.0"),
        "compose": ("ok", "Docker Compose 2.20"),
        "toolkit": ("ok", "NVIDIA Container Toolkit 1.14"),
    }


def test_versions_that_are_too_old(host: Host) -> None:
    host.docker("23.0.6", "2.19.1")
    host.tool("nvidia-ctk", 'echo "NVIDIA Container Toolkit CLI version 1.13.5"')
    found = host.versions(nvidia=True)
    assert {finding.status for finding in found.values()} == {"warning"}
    assert found["docker"].text == "Docker 23.0 is older than 24.0"
    assert found["compose"].cure.startswith("install Docker Compose 2.20 or later")
    assert found["toolkit"].text == "NVIDIA Container Toolkit 1.13 is older than 1.14"


def test_a_toolkit_that_is_missing_matters_with_a_card_only(host: Host) -> None:
    host.docker(compose="")
    found = host.versions(nvidia=True)
    assert (found["toolkit"].status, found["compose"].status) == ("warning", "skipped")
    assert host.versions(nvidia=False)["toolkit"].status == "skipped"


def test_something_else_by_that_name(host: Host) -> None:
    host.tool("docker", 'echo "podman version 4.3.1"')
    found = host.versions()["docker"]
    assert (found.status, found.text) == ("skipped", "it is not Docker that answers: podman version 4.3.1")


def test_a_tool_that_hangs_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TOOL_SECONDS", 0.2)
    host.tool("docker", f"echo $$ > {host.root}/pid; exec sleep 600")
    assert host.versions()["docker"].status == "skipped"
    assert not Path("/proc", (host.root / "pid").read_text().strip()).exists()


def test_a_tool_that_cannot_be_started(host: Host) -> None:
    (host.bin / "docker").write_bytes(b"\x7fELF nonsense")
    (host.bin / "docker").chmod(0o755)
    assert host.versions()["docker"].status == "skipped"


def test_without_unit_and_container_there_is_nothing_to_compare(host: Host) -> None:
    assert host.drain().status == "skipped"
    host.systemd("Id=xerotier-xim-agent.service\nLoadState=not-found\nTimeoutStopUSec=1min 30s")
    host.docker(seen='/db|5|["postgres"]')
    assert host.drain().status == "skipped"


def test_a_unit_that_waits_long_enough_and_one_that_does_not(host: Host) -> None:
    shown = "Id=xerotier-xim-agent.service\nLoadState=loaded\nTimeoutStopUSec=2min 30s"
    host.systemd(shown)
    assert host.drain().status == "ok"
    host.tool(
        "systemctl",
        f"cat <<'END'\n{shown}\n\n{shown.replace('agent.', 'agent@b.').replace('2min 30s', '1min 30s')}\nEND",
    )
    found = host.drain()
    assert (found.status, found.exit_code) == ("warning", 0)
    assert found.text.startswith("xerotier-xim-agent@b.service is killed after 90 s, a stop takes up to 145")
    assert "`systemctl edit xerotier-xim-agent@b.service`: [Service] TimeoutStopSec=150" in found.cure


def test_a_longer_drain_needs_a_longer_wait(host: Host) -> None:
    host.docker(seen='/x-agent-1|150|["/usr/bin/xerotier-xim-agent","run"]')
    assert host.drain(120).status == "ok"
    found = host.drain(600)
    assert found.status == "warning"
    assert found.text.startswith("x-agent-1 is killed after 150 s, a stop takes up to 625")
    assert "XEROTIER_AGENT_STOP_GRACE=630s" in found.cure


def test_a_router_of_ours_has_nothing_to_drain(host: Host) -> None:
    host.docker(seen='/x-router-1|<nil>|["/opt/xerotier/xerotier-xim-agent","router"]')
    assert host.drain().status == "skipped"


def test_a_container_of_ours_without_a_number_has_dockers_ten_seconds(host: Host) -> None:
    host.docker(seen='/x-agent-1|<nil>|["/usr/bin/xerotier-xim-agent"]')
    assert "killed after 10 s" in host.drain().text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2min 30s", 150.0),
        ("1h", 3600.0),
        ("500ms", 0.5),
        ("1.5s", 1.5),
        ("infinity", float("inf")),
        ("", None),
        ("soon", None),
    ],
)
def test_spans_of_systemd(text: str, seconds: float | None) -> None:
    assert tools.span(text) == seconds
