"""Packages around the real program, in a Debian of their own: installed, upgraded, removed."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes import debian
from fakes.packages import NAME, ROOT, build, checkout, raise_revision, results

from xim_agent import __version__

pytestmark = [pytest.mark.e2e, pytest.mark.full]
ENV = "/etc/xerotier/xim-agent.env"
STATE = "/var/lib/xerotier"


class Packages:
    def __init__(self, dist: Path, scratch: Path) -> None:
        source = checkout(scratch / "src")
        self.deb, self.rpm = build(source, dist, scratch / "old")
        raise_revision(source)  # packed in a second, not in 30
        self.newer_deb, self.newer_rpm = build(source, results(scratch / "dist"), scratch / "new")


@pytest.fixture(scope="module")
def packages(agent_exe: Path, tmp_path_factory: Any) -> Packages:
    return Packages(agent_exe.parent, tmp_path_factory.mktemp("packages"))


def done(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


class System:
    """A Debian that is not running."""

    def __init__(self, root: Path) -> None:
        self.root = debian.unpack(debian.archive("systemd-sysv", "dbus", "python3", "procps"), root)

    def run(self, *command: str) -> str:
        return done("chroot", self.root, *command)

    def dpkg(self, *arguments: str, package: Path | None = None) -> str:
        if package is not None:
            shutil.copy(package, self.root / "root/agent.deb")
            arguments = (*arguments, "/root/agent.deb")
        return self.run("dpkg", *arguments)

    def rpm(self, *arguments: str | Path) -> str:
        return done("rpm", "--root", self.root, *arguments)

    def has(self, path: str) -> bool:
        return (self.root / path.lstrip("/")).exists()

    def mode(self, path: str) -> str:
        return self.run("stat", "-c", "%U:%G %a", path).strip()

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def enabled(self) -> list[str]:
        return sorted(p.name for p in (self.root / "etc/systemd/system").rglob("xerotier*"))

    def lived_in(self) -> None:
        """What an administrator and the agents have written."""
        for path in (f"{STATE}/.config/xerotier/enrollment.json", "/var/cache/xerotier/models/x"):
            self.write(path, "")
        self.write("/var/lib/xerotier-agents/a/x", "")
        self.write("/etc/xerotier/join-key@a", "xjk_")
        self.write("/etc/xerotier/xim-agent@a.env", "")
        self.run("systemctl", "enable", f"{NAME}.service", f"{NAME}@a.service")
        assert self.enabled() == [f"{NAME}.service", f"{NAME}@a.service"]

    def installed(self) -> None:
        assert self.run(f"/usr/bin/{NAME}", "--version").startswith(f"{NAME} {__version__} ")
        user = self.run("getent", "passwd", "xerotier").strip().split(":")
        assert int(user[2]) < 1000, "a system user: systemd would take away the shared memory of another"
        assert user[5:] == [STATE, "/usr/sbin/nologin"]
        assert {"video", "render"} <= set(self.run("id", "-nG", "xerotier").split())
        assert (self.mode("/etc/xerotier"), self.mode(ENV)) == ("root:xerotier 750", "root:xerotier 640")
        assert self.mode(STATE) == "xerotier:xerotier 700"
        assert self.enabled() == [], "that is the administrator's to do"
        units = [f"/usr/lib/systemd/system/{NAME}{at}.service" for at in ("", "@")]
        assert self.run("systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", *units) == ""


@pytest.fixture
def system(tmp_path: Path) -> Any:
    made = System(tmp_path / "root")
    yield made
    shutil.rmtree(made.root)


def test_another_place_and_time_give_an_rpm_of_the_same_bytes(tmp_path: Path) -> None:
    dist = results(tmp_path / "dist")
    (one,) = build(checkout(tmp_path / "a"), dist, tmp_path / "1", "--rpm")
    for path in dist.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    (two,) = build(checkout(tmp_path / "b/c"), dist, tmp_path / "2", "--rpm")
    assert one.read_bytes() == two.read_bytes()


def test_lintian_rpmlint_and_shellcheck_find_nothing(packages: Packages, tmp_path: Path) -> None:
    assert done("lintian", "--fail-on", "error,warning", "--allow-root", packages.deb) == ""
    found = done("rpmlint", "-c", ROOT / "packaging/rpm/rpmlint.toml", packages.rpm)
    assert " 0 errors, " in found
    done("dpkg-deb", "-e", packages.deb, tmp_path)
    done("shellcheck", *(tmp_path / name for name in ("postinst", "prerm", "postrm")))
    for name in ("prein", "posttrans", "preun", "postun"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\n" + done("rpm", "-qp", "--qf", f"%{{{name.upper()}}}\n", packages.rpm))
        done("shellcheck", "--exclude=SC2050", script)


def test_the_life_of_the_deb(system: System, packages: Packages) -> None:
    system.dpkg("-i", package=packages.deb)
    system.installed()
    assert "dependency problems" not in system.dpkg("--audit")

    system.lived_in()
    system.write(ENV, "XEROTIER_AGENT_LOG_LEVEL=debug\n")
    system.run("chmod", "0600", ENV)
    system.dpkg("--force-confold", "-i", package=packages.newer_deb)
    assert system.run("dpkg-query", "-W", "-f", "${Version}", NAME) == f"{__version__}-2"
    assert (system.root / ENV[1:]).read_text() == "XEROTIER_AGENT_LOG_LEVEL=debug\n"
    assert system.mode(ENV) == "root:xerotier 600"
    assert system.enabled() == [f"{NAME}.service", f"{NAME}@a.service"]

    system.dpkg("--remove", NAME)
    assert not system.has(f"/usr/lib/{NAME}")
    assert not system.has(f"/usr/bin/{NAME}")
    assert system.enabled() == []
    for kept in (f"{STATE}/.config/xerotier/enrollment.json", "/var/cache/xerotier/models/x", ENV):
        assert system.has(kept)
    system.dpkg("-i", package=packages.deb)
    assert (system.root / ENV[1:]).read_text() == "XEROTIER_AGENT_LOG_LEVEL=debug\n"
    assert system.has(f"{STATE}/.config/xerotier/enrollment.json")

    system.dpkg("--purge", NAME)
    left = system.run("find", "/", "-xdev", "-name", "*xerotier*", "-not", "-path", "/proc/*")
    assert left == ""
    assert system.run("getent", "passwd", "xerotier")
    system.dpkg("-i", package=packages.deb)
    system.installed()


def test_the_life_of_the_rpm(system: System, packages: Packages) -> None:
    system.rpm("--initdb")
    system.rpm("-ivh", "--nodeps", packages.rpm)
    system.installed()

    system.lived_in()
    system.write(ENV, "XEROTIER_AGENT_LOG_LEVEL=debug\n")
    system.rpm("-Uvh", "--nodeps", packages.newer_rpm)
    assert system.rpm("-q", NAME).startswith(f"{NAME}-{__version__}-2.")
    assert (system.root / ENV[1:]).read_text() == "XEROTIER_AGENT_LOG_LEVEL=debug\n"
    assert system.enabled() == [f"{NAME}.service", f"{NAME}@a.service"]

    system.rpm("-e", NAME)
    assert not system.has(f"/usr/lib/{NAME}")
    assert system.enabled() == []
    assert system.has(f"{STATE}/.config/xerotier/enrollment.json")
    assert (system.root / f"{ENV[1:]}.rpmsave").read_text() == "XEROTIER_AGENT_LOG_LEVEL=debug\n"
    system.rpm("-ivh", "--nodeps", packages.rpm)
    assert system.has(f"{STATE}/.config/xerotier/enrollment.json")


def test_the_rpm_asks_for_the_c_library_and_nothing_of_vllm(packages: Packages) -> None:
    asks = done("rpm", "-qp", "--requires", packages.rpm).splitlines()
    (glibc,) = [line for line in asks if line.startswith("libc.so.6")]
    assert glibc.startswith("libc.so.6(GLIBC_2.")
    assert {line for line in asks if not line.startswith(("rpmlib(", "libc.so.6", "/bin/sh"))} == {"systemd"}
