"""The .deb in a Debian with its systemd: the units lived through, with the local router and a fake vLLM."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import debian
from fakes.booted import Machine, booted, until

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]
UNIT = "xerotier-xim-agent"
URL = "http://127.0.0.1:8080"
ENV = "/etc/xerotier/xim-agent.env"
KEY = "/etc/xerotier/join-key"
GET = """import sys, urllib.request as r
try: print(r.urlopen(sys.argv[1]).status)
except OSError as e: print(getattr(e, "code", 0))"""
ASK = """import json, sys, urllib.request as r
q = r.Request(sys.argv[1] + "/v1/completions", json.dumps(json.load(sys.stdin)).encode(),
              {"Authorization": "Bearer " + sys.argv[2], "Content-Type": "application/json"})
print(r.urlopen(q, timeout=90).read().decode())"""


class Host:
    """A machine with router, model and fake vLLM on which the package is installed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.run, self.show = machine.run, machine.show
        self.cli = lambda *words: self.run("/usr/bin/" + UNIT, *words, "--data", "/srv/router")
        self.start_router()
        self.cli("router", "model", "publish", "/srv/toy", "--name", "toy")
        self.cli("router", "assign", "toy")
        self.api_key = self.cli("router", "api-key", "create", "--project", "test")

    def start_router(self) -> None:
        serve = ("router", "serve", "--listen", URL.removeprefix("http://"), "--data", "/srv/router")
        self.run("systemd-run", "-q", "--unit=router", "/usr/bin/" + UNIT, *serve)
        until("the router answers", lambda: self.get(f"{URL}/v1/models") in (200, 401))

    def join_key(self) -> str:
        return self.cli("router", "join-key", "create", "--project", "test")

    def set_up(self, name: str = "", key: str | None = None, drop_in: str = "", **settings: str) -> str:
        """Settings and key of a unit (`name`: an instance); returns its name."""
        at = f"@{name}" if name else ""
        env = {"MODEL_CACHE_MAX_SIZE_GB": "1", "VLLM_ENV": "FAKE_VLLM_SHM=1", **settings}
        self.machine.write(
            f"/etc/xerotier/xim-agent{at}.env", "".join(f"XEROTIER_AGENT_{k}='{v}'\n" for k, v in env.items()), 0o640
        )
        self.machine.write(KEY + at, (self.join_key() if key is None else key) + "\n", 0o600)
        unit = f"{UNIT}{at}.service"
        if drop_in:
            self.machine.write(f"/etc/systemd/system/{unit}.d/test.conf", f"[Service]\n{drop_in}\n")
        self.run("systemctl", "daemon-reload")
        return unit

    def start(self, unit: str, port: int = 9094) -> int:
        """Until it serves; its main process."""
        self.run("systemctl", "start", unit)
        return self.serves(unit, port)

    def serves(self, unit: str, port: int = 9094) -> int:
        until(f"{unit} serves", lambda: self.get(f"http://127.0.0.1:{port}/readyz") == 200, 60)
        return int(self.show(unit, "MainPID")["MainPID"])

    def get(self, url: str) -> int:
        return int(self.run("python3", "-c", GET, url))

    def ask(self, **more: Any) -> dict[str, Any]:
        body = {"model": "toy", "prompt": "hello", "max_tokens": 4, **more}
        answer: dict[str, Any] = json.loads(
            self.run("python3", "-c", ASK, URL, self.api_key, text=json.dumps(body), seconds=120)
        )
        return answer

    def engines(self) -> list[str]:
        return self.run("pgrep", "-f", "/opt/vllm/bin/vllm", check=False).split()

    def nothing_left(self) -> None:
        until("no vLLM is left", lambda: not self.engines(), 15)
        assert self.run("ls", "/dev/shm") == ""
        assert UNIT not in self.run("ls", "/tmp", "/var/tmp")


@pytest.fixture(scope="module")
def deb(agent_onedir: Path, tmp_path_factory: Any) -> Path:
    to = tmp_path_factory.mktemp("deb")
    command = [sys.executable, str(ROOT / "build/package"), "--deb", "--from", str(agent_onedir.parents[1])]
    subprocess.run([*command, "--to", str(to)], check=True, timeout=300)
    [package] = to.glob("*.deb")
    return Path(package)


@pytest.fixture(scope="module")
def machine_wide(deb: Path, toy_model: Path, tmp_path_factory: Any) -> Iterator[Host]:
    place = tmp_path_factory.mktemp("booted")
    root = debian.unpack(debian.archive("systemd-sysv", "dbus", "python3", "procps"), place / "root")
    shutil.copy(deb, root / "root/agent.deb")
    subprocess.run(["chroot", root, "dpkg", "-i", "/root/agent.deb"], check=True, timeout=120)
    shutil.copytree(toy_model, root / "srv/toy")
    (root / "opt/vllm/bin").mkdir(parents=True)
    shutil.copy(ROOT / "tests/fakes/fake_vllm.py", root / "opt/vllm/bin/vllm")
    (root / "opt/vllm/bin/vllm").chmod(0o755)
    with booted(root) as machine:
        yield Host(machine)
    shutil.rmtree(place)


@pytest.fixture
def host(machine_wide: Host) -> Iterator[Host]:
    """As it was after the installation; the router runs."""
    yield machine_wide
    units = f"{UNIT}.service", f"{UNIT}@*.service"
    machine_wide.run("systemctl", "stop", *units)
    machine_wide.run("systemctl", "reset-failed", *units, check=False)
    settings = ("/etc/systemd/system/" + UNIT + "*", KEY + "*", "/etc/xerotier/*@*")
    places = ("/var/lib/xerotier/.??*", "/var/cache/xerotier*/*", "/var/lib/xerotier-agents/*")
    machine_wide.run("sh", "-c", "rm -rf " + " ".join(settings + places))
    machine_wide.run("systemctl", "daemon-reload")
    machine_wide.nothing_left()


def test_a_life(host: Host) -> None:
    loading = "FAKE_VLLM_SHM=1 FAKE_VLLM_START_SECONDS=8"  # the status is told every 5 s
    unit = host.set_up(VLLM_ENV=loading)
    host.run("systemctl", "start", unit)  # READY comes before the model does
    assert host.get("http://127.0.0.1:9094/readyz") == 503
    assert host.show(unit, "ActiveState")["ActiveState"] == "active"
    until("it tells that it loads", lambda: "engine starting" in host.show(unit, "StatusText")["StatusText"])
    main = host.serves(unit)
    ready = lambda: host.show(unit, "StatusText")["StatusText"].startswith("ready; model toy ")  # noqa: E731
    until("it tells that it is ready", ready)
    assert host.ask()["choices"]

    before = host.engines()
    host.machine.write("/var/lib/xerotier/.config/xerotier/log-level", "debug\n")
    host.run("systemctl", "reload", unit)
    assert host.show(unit, "ActiveState", "MainPID") == {"ActiveState": "active", "MainPID": str(main)}
    assert '"level_now": "debug"' in host.machine.journal(unit)
    assert host.engines() == before

    variables = [host.run("cat", f"/proc/{pid}/environ") for pid in (str(main), *before)]
    assert not [v for v in variables[1:] if "NOTIFY_SOCKET" in v or "WATCHDOG" in v or "CREDENTIALS" in v]
    key = host.run("cat", KEY)
    assert not [v for v in variables if key in v]
    assert host.run("ls", "/dev/shm") == "", "it has one of its own"
    assert "psm_" in host.run("ls", f"/proc/{main}/root/dev/shm")
    modes = host.run("stat", "-c", "%U %a", "/var/lib/xerotier", "/var/cache/xerotier", f"/run/{UNIT}").split("\n")
    assert modes == ["xerotier 700"] * 3
    limits = host.run("cat", f"/proc/{before[0]}/status")
    assert "NoNewPrivs:\t1" in limits
    assert "CapBnd:\t0000000000000000" in limits

    host.run("systemctl", "stop", unit, seconds=160)
    assert host.show(unit, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
    assert "drain 4/4" in host.machine.journal(unit)
    host.nothing_left()
    host.run("test", "!", "-e", f"/run/{UNIT}")

    host.run("rm", KEY)
    host.start(unit)  # enrolled: no key is needed any more


@pytest.mark.parametrize("how", ["KILL", "STOP"])
def test_an_agent_that_crashes_or_hangs_comes_back(host: Host, how: str) -> None:
    unit = host.set_up(drop_in="WatchdogSec=6", VLLM_ENV="FAKE_VLLM_CORE=1 FAKE_VLLM_SHM=1")
    main = host.start(unit)
    old = host.engines()
    host.run("kill", f"-{how}", str(main))
    until("it is started again", lambda: host.show(unit, "NRestarts")["NRestarts"] == "1", 30)
    until("it runs", lambda: host.show(unit, "ActiveState")["ActiveState"] == "active")
    assert host.serves(unit) != main
    assert not set(old) & set(host.engines())
    assert ("Watchdog timeout" in host.machine.journal(unit)) == (how == "STOP")
    assert host.ask()["choices"]


@pytest.mark.parametrize(
    ("key", "settings", "code"),
    [
        ("xjk_short", {}, 78),
        ("", {}, 78),
        (None, {"METRICS_PORT": "70000"}, 78),
        ("other", {}, 10),
        (None, {"CONFIG_PATH": "/etc/xerotier"}, 77),
    ],
    ids=["malformed key", "no key", "bad setting", "another's key", "state of another user"],
)  # fmt: skip
def test_what_only_a_person_can_cure_is_not_tried_again(
    host: Host, key: str | None, settings: dict[str, str], code: int
) -> None:
    if key == "other":
        key = host.join_key()
        newest = max(row["id"] for row in json.loads(host.cli("router", "join-key", "ls", "--json")))
        host.cli("router", "join-key", "revoke", str(newest))
    unit = host.set_up(key=key, drop_in="RestartSec=0", **settings)
    assert host.machine.asked("systemctl", "start", unit).returncode != 0
    found = host.show(unit, "ActiveState", "ExecMainStatus", "NRestarts")
    assert found == {"ActiveState": "failed", "ExecMainStatus": str(code), "NRestarts": "0"}


def test_what_fails_again_and_again_is_given_up(host: Host) -> None:
    unit = host.set_up(drop_in="RestartSec=0\nType=simple\nExecStart=\nExecStart=/bin/sh -c 'exit 70'")
    host.run("systemctl", "start", unit)
    until("it is given up", lambda: "too quickly" in host.machine.journal(unit))
    assert host.show(unit, "ActiveState", "NRestarts") == {"ActiveState": "failed", "NRestarts": "5"}


def test_two_agents_beside_each_other(host: Host) -> None:
    a = host.set_up("a", METRICS_PORT="9101")
    b = host.set_up("b", METRICS_PORT="9102")
    mains = [host.start(a, 9101), host.start(b, 9102)]
    agents = json.loads(host.cli("router", "agents", "ls", "--json"))
    assert {f"{host.run('hostname')}-{name}" for name in "ab"} <= {agent["name"] for agent in agents}
    for name in "ab":
        for place in ("/var/lib", "/var/cache", "/run"):
            host.run("test", "-d", f"{place}/xerotier-agents/{name}")
    host.run("systemctl", "stop", a, seconds=160)
    assert host.get("http://127.0.0.1:9102/readyz") == 200
    assert host.show(b, "MainPID")["MainPID"] == str(mains[1])
    assert host.ask()["choices"]
    host.run("test", "!", "-e", "/run/xerotier-agents/a")


def test_an_instance_without_settings_does_not_start(host: Host) -> None:
    assert host.machine.asked("systemctl", "start", f"{UNIT}@c").returncode != 0
    assert "Failed to load environment files" in host.machine.journal(f"{UNIT}@c")


def test_a_drain_that_is_longer_than_the_units_time(host: Host) -> None:
    unit = host.set_up(drop_in="TimeoutStopSec=3", DRAIN_TIMEOUT_SECONDS="100")
    main = host.start(unit)
    body = {"model": "toy", "prompt": "hello", "max_tokens": 8, "fake": {"delay": 1.0}}
    command = ["nsenter", "-t", str(host.machine.pid), "-a", "--", "python3", "-c", ASK, URL, host.api_key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        asking.stdin.write(json.dumps(body))
        asking.stdin.close()
        until("it runs", lambda: ", 1 of" in host.show(unit, "StatusText")["StatusText"], 15)
        host.run("systemctl", "stop", unit, seconds=120)
        assert len(json.loads(asking.stdout.read())["choices"]) == 1
    assert host.show(unit, "Result")["Result"] == "success"
    assert str(main) not in host.run("ls", "/proc").split()


def test_the_first_start_waits_for_the_router(host: Host) -> None:
    unit = host.set_up()
    host.run("systemctl", "stop", "router")
    host.run("systemctl", "start", "--no-block", unit)
    told = lambda: host.show(unit, "StatusText")["StatusText"].startswith("not enrolled; ")  # noqa: E731
    until("it tells why", told)
    assert host.show(unit, "ActiveState")["ActiveState"] == "activating"
    host.start_router()
    host.serves(unit)
    assert host.show(unit, "ActiveState", "NRestarts") == {"ActiveState": "active", "NRestarts": "0"}
