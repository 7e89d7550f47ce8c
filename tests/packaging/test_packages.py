"""Packages around a stand-in for the frozen program. The real one is installed in test_installed.py."""

import gzip
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes.packages import NAME, ROOT, build, checkout, raise_revision, results

from xim_agent import __version__


class Deb:
    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self.root, self.control = scratch / "root", scratch / "control"
        subprocess.run(["dpkg-deb", "-x", path, self.root], check=True)
        subprocess.run(["dpkg-deb", "-e", path, self.control], check=True)
        listing = subprocess.run(["dpkg-deb", "-c", path], check=True, capture_output=True, text=True).stdout
        self.entries = {line.split()[5].strip("./"): line.split() for line in listing.splitlines()}

    def field(self, name: str) -> str:
        return subprocess.run(["dpkg-deb", "-f", self.path, name], check=True, capture_output=True, text=True).stdout[
            :-1
        ]


@pytest.fixture(scope="module")
def deb(tmp_path_factory: Any) -> Deb:
    scratch = tmp_path_factory.mktemp("deb")
    (package,) = build(checkout(scratch / "src"), results(scratch / "dist"), scratch / "to", "--deb")
    return Deb(package, scratch)


def test_fields(deb: Deb) -> None:
    version = f"{__version__}-1"
    machine = subprocess.run(
        ["dpkg", "--print-architecture"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert deb.path.name == f"{NAME}_{version}_{machine}.deb"
    assert (deb.field("Package"), deb.field("Version"), deb.field("Architecture")) == (NAME, version, machine)
    needed = subprocess.run(["objdump", "-p", "/bin/true"], check=True, capture_output=True, text=True).stdout
    glibc = max(tuple(map(int, v)) for v in re.findall(r"GLIBC_(\d+)\.(\d+)", needed))
    assert f"libc6 (>= {glibc[0]}.{glibc[1]})" in deb.field("Depends").split(", ")
    assert "vllm" not in (deb.field("Depends") + deb.field("Recommends")).lower()
    assert (deb.control / "conffiles").read_text() == "/etc/xerotier/xim-agent.env\n"


def test_what_it_holds_and_who_may_do_what_with_it(deb: Deb) -> None:
    modes = {path: entry[0] for path, entry in deb.entries.items()}
    assert {entry[1] for entry in deb.entries.values()} == {"root/root"}
    assert modes.pop("etc/xerotier") == "drwxr-x---"
    assert modes.pop("etc/xerotier/xim-agent.env") == "-rw-r-----", "it may hold a join key"
    assert modes.pop("var/lib/xerotier") == "drwx------", "private keys"
    links = {path for path, mode in modes.items() if mode[0] == "l"}
    assert links == {f"usr/bin/{NAME}", f"usr/lib/{NAME}/_internal/libtrue.so"}
    assert {path for path, mode in modes.items() if mode == "-rwxr-xr-x"} == {f"usr/lib/{NAME}/{NAME}"}
    assert {mode for path, mode in modes.items() if path not in links} == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"}
    assert (deb.root / f"usr/bin/{NAME}").resolve() == (deb.root / f"usr/lib/{NAME}/{NAME}").resolve()
    units = {p.name: p.read_bytes() for p in (ROOT / "packaging/systemd").glob("*.service")}
    assert set(units) == {f"{NAME}.service", f"{NAME}@.service"}
    assert {p.name: p.read_bytes() for p in (deb.root / "usr/lib/systemd/system").iterdir()} == units
    started = re.findall(r"^ExecStart=(\S+)", b"\n".join(units.values()).decode(), re.MULTILINE)
    assert [deb.root / path[1:] for path in started] == [deb.root / f"usr/lib/{NAME}/{NAME}"] * 2


def test_documents(deb: Deb) -> None:
    doc = deb.root / f"usr/share/doc/{NAME}"
    assert (doc / "copyright").read_text().startswith("what licenses prints")
    changelog = gzip.decompress((doc / "changelog.Debian.gz").read_bytes()).decode()
    assert changelog.startswith(f"{NAME} ({__version__}-1) ")
    (hashes,) = json.loads((doc / f"{NAME}.cdx.json").read_text())["metadata"]["component"]["hashes"]
    digest = subprocess.run(
        ["sha256sum", deb.root / f"usr/lib/{NAME}/{NAME}"], check=True, capture_output=True, text=True
    )
    assert hashes["content"] == digest.stdout.split()[0], "that of the form that is in the package"
    page = gzip.decompress((deb.root / f"usr/share/man/man1/{NAME}.1.gz").read_bytes()).decode()
    assert "what \\-\\-help prints: .dots, 'quotes', back\\eslash\n\\&.line\n" in page


def test_every_file_that_is_not_the_administrators_has_its_digest(deb: Deb) -> None:
    files = {path for path, entry in deb.entries.items() if entry[0][0] == "-"} - {"etc/xerotier/xim-agent.env"}
    sums = deb.control / "md5sums"
    assert {line.split("  ")[1] for line in sums.read_text().splitlines()} == files
    subprocess.run(["md5sum", "--quiet", "--check", sums], cwd=deb.root, check=True)


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm"])
def test_scripts_are_complete_and_enable_and_start_nothing(deb: Deb, name: str) -> None:
    script = deb.control / name
    text = script.read_text()
    assert script.stat().st_mode & 0o777 == 0o755
    assert "@" not in text.replace("xerotier-xim-agent@", "").replace("join-key@*", "").replace("xim-agent@*.env", "")
    subprocess.run(["sh", "-n", script], check=True)
    assert not re.search(r"\b(enable|start|unmask|preset)\b", re.sub(r"#.*", "", text))


def test_another_place_mask_and_time_give_the_same_bytes(deb: Deb, tmp_path: Path) -> None:
    source = checkout(tmp_path / "another/place")
    dist = results(tmp_path / "dist")
    for path in dist.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    before = os.umask(0o077)
    try:
        (package,) = build(source, dist, tmp_path / "to", "--deb")
    finally:
        os.umask(before)
    assert package.read_bytes() == deb.path.read_bytes()


def test_a_changelog_of_another_version_is_refused(tmp_path: Path) -> None:
    source = checkout(tmp_path / "src")
    (source / "xim_agent/__init__.py").write_text('__version__ = "7.8.9"\n')
    command = [source / "build/package", "--deb", "--from", results(tmp_path / "dist"), "--to", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"begins with {__version__}, the agent is 7.8.9: add an entry" in done.stderr


def test_a_new_entry_makes_a_new_version(tmp_path: Path) -> None:
    source = checkout(tmp_path / "src")
    version = raise_revision(source)
    (package,) = build(source, results(tmp_path / "dist"), tmp_path / "to", "--deb")
    assert f"_{version}_" in package.name
