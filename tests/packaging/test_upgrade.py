"""What the maintainer scripts do where a systemd runs: nothing starts by itself, what runs is restarted or stopped."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import debian
from fakes.booted import Machine, booted, until
from fakes.packages import NAME, build, checkout, raise_revision, results

pytestmark = pytest.mark.full
UNITS = [f"{NAME}.service", f"{NAME}@a.service"]
POLICY = "/usr/sbin/policy-rc.d"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: Any) -> Iterator[Machine]:
    """With three versions of the package in /root; their program is a stand-in."""
    place = tmp_path_factory.mktemp("upgraded")
    root = debian.unpack(debian.archive("systemd-sysv", "dbus", "python3", "procps"), place / "root")
    source, dist = checkout(place / "src"), results(place / "dist")
    for version in "123":
        (package,) = build(source, dist, place / "to", "--deb")
        shutil.copy(package, root / f"root/{version}.deb")
        raise_revision(source)
    with booted(root) as made:
        yield made
    shutil.rmtree(place)


def state(machine: Machine, unit: str) -> tuple[str, str]:
    found = machine.show(unit, "ActiveState", "MainPID")
    return found["ActiveState"], found["MainPID"]


def test_what_runs_is_restarted_and_what_does_not_stays_so(machine: Machine) -> None:
    machine.run("dpkg", "-i", "/root/1.deb")
    assert [state(machine, unit)[0] for unit in UNITS] == ["inactive", "inactive"]
    machine.write("/etc/xerotier/xim-agent@a.env", "")
    machine.run("systemctl", "enable", "--now", UNITS[1])
    before = state(machine, UNITS[1])
    assert before[0] == "active"

    said = machine.run("dpkg", "-i", "/root/2.deb")
    assert f"{UNITS[1]} restarts when the requests that run are answered" in said
    assert UNITS[0] not in said
    until(
        "the instance is a new process", lambda: state(machine, UNITS[1]) not in (before, ("deactivating", before[1]))
    )
    until("it runs", lambda: state(machine, UNITS[1])[0] == "active")
    assert state(machine, UNITS[0])[0] == "inactive"

    machine.write(POLICY, "#!/bin/sh\nexit 101\n", 0o755)
    before = state(machine, UNITS[1])
    said = machine.asked("dpkg", "-i", "/root/3.deb")
    assert "policy-rc.d" in said.stderr
    assert state(machine, UNITS[1]) == before
    machine.run("rm", POLICY)

    said_at_the_end = machine.run("dpkg", "--remove", NAME)
    assert f"{UNITS[1]} stops when the requests that run are answered" in said_at_the_end
    assert machine.run("pgrep", "-u", "xerotier", check=False) == ""
    machine.run("dpkg", "-i", "/root/1.deb")
    enabled = [machine.asked("systemctl", "is-enabled", unit).stdout.strip() for unit in UNITS]
    assert enabled == ["disabled", "disabled"]
    assert [state(machine, unit)[0] for unit in UNITS] == ["inactive", "inactive"]
