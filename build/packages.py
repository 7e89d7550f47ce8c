"""What the packages hold, and how they are put together so that the same sources give the same bytes."""

import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from elf import elf_files, needs
from environment import ROOT, run
from sbom import sbom_of

sys.path.insert(0, str(ROOT))
from xim_agent import __version__

NAME = "xerotier-xim-agent"
PACKAGING = ROOT / "packaging"
UNITS = PACKAGING / "systemd"
PROGRAM = Path("usr/lib", NAME)
DOC = Path("usr/share/doc", NAME)
ENVIRONMENT = Path("etc/xerotier/xim-agent.env")
MODES = {Path("etc/xerotier"): 0o750, ENVIRONMENT: 0o640, Path("var/lib/xerotier"): 0o700}
DEBIAN_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
# An administrator forbids restarts by its exit code 101; deb-systemd-invoke, which asks it, cannot do without waiting.
DEBIAN_POLICY = '[ ! -x /usr/sbin/policy-rc.d ] || /usr/sbin/policy-rc.d "$unit" restart'
_ENTRY = re.compile(
    rf"{NAME} \((?P<upstream>[\d.]+)-(?P<revision>\d+)\) .*\n\n(?P<changes>(?:.*\n)+?)\n -- (?P<who>.*>)  (?P<at>.*)\n"
)


@dataclass(frozen=True)
class Release:
    """The first entry of packaging/changelog."""

    upstream: str
    revision: str
    changes: str
    who: str
    at: datetime

    @property
    def version(self) -> str:
        return f"{self.upstream}-{self.revision}"

    @property
    def env(self) -> dict[str, str]:
        return {"SOURCE_DATE_EPOCH": str(int(self.at.timestamp())), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def newest() -> Release:
    """Ends the program when the changelog's first entry is not about this version of the agent."""
    changelog = PACKAGING / "changelog"
    found = _ENTRY.match(changelog.read_text())
    if found is None:
        sys.exit(f"package: {changelog} does not begin with an entry for {NAME} (VERSION-REVISION)")
    if found["upstream"] != __version__:
        sys.exit(f"package: {changelog} begins with {found['upstream']}, the agent is {__version__}: add an entry")
    at = parsedate_to_datetime(found["at"])
    return Release(found["upstream"], found["revision"], found["changes"], found["who"], at)


def tree(dist: Path, release: Release, root: Path) -> Path:
    """Lays out in `root` what both packages install; returns it. `dist`: results of build/freeze or build/release."""
    shutil.copytree(dist / "onedir", root / PROGRAM, symlinks=True)
    executable = root / PROGRAM / NAME
    (root / "usr/bin").mkdir()
    (root / "usr/bin" / NAME).symlink_to(Path("../lib", NAME, NAME))
    for unit in sorted(UNITS.glob("*.service")):
        _write(root / "usr/lib/systemd/system" / unit.name, unit.read_bytes())
    _write(root / "usr/lib/sysusers.d" / f"{NAME}.conf", (UNITS / "sysusers.conf").read_bytes())
    _write(root / ENVIRONMENT, (UNITS / ENVIRONMENT.name).read_bytes())
    (root / "var/lib/xerotier").mkdir(parents=True)
    _write(root / DOC / "README.md", (PACKAGING / "README.md").read_bytes())
    _write(root / DOC / "copyright", _said(executable, "licenses").encode())
    _write(root / DOC / f"{NAME}.cdx.json", sbom_of(executable, dist / f"{NAME}.cdx.json").encode())
    _write(root / f"usr/share/man/man1/{NAME}.1.gz", _zipped(manual(_said(executable, "--help"), release)))
    return root


def manual(usage: str, release: Release) -> str:
    """A manual page around what `--help` prints."""
    quoted = usage.replace("\\", "\\e").replace("-", "\\-")
    quoted = re.sub(r"(?m)^(?=[.'])", r"\\&", quoted)
    name = NAME.replace("-", "\\-")
    return (
        f'.TH {name.upper()} 1 "{release.at:%Y-%m-%d}" "{release.upstream}"\n'
        f".SH NAME\n{name} \\- serve language models with vLLM as a worker of a XIM router\n"
        f".SH SYNOPSIS\n.B {name}\n[\\fIoptions\\fR] \\fIcommand\\fR [\\fIarguments\\fR]\n"
        f".SH DESCRIPTION\n.nf\n{quoted}.fi\n"
        f".SH FILES\n.TP\n.I /{ENVIRONMENT}\nsettings of the service\n"
        f".TP\n.I /{DOC}/README.md\nhow it is installed, started and looked after\n"
    )


def deb(root: Path, release: Release, to: Path) -> Path:
    """Makes the .deb of `tree` in the directory `to`; puts Debian's own files into `root`."""
    _write(root / DOC / "changelog.Debian.gz", _zipped((PACKAGING / "changelog").read_text()))
    _write(root / "usr/share/lintian/overrides" / NAME, (PACKAGING / "deb/lintian-overrides").read_bytes())
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and not f.is_symlink()]
    machine = DEBIAN_MACHINES[os.uname().machine]
    values = {
        "VERSION": release.version,
        "ARCHITECTURE": machine,
        "MAINTAINER": release.who,
        "SIZE": str(sum(-(-f.stat().st_size // 1024) for f in files)),
        "GLIBC": _glibc(root),
        "MAY_RESTART": DEBIAN_POLICY,
    }
    for name in ("control", "postinst", "prerm", "postrm"):
        _write(root / "DEBIAN" / name, filled(PACKAGING / "deb" / name, values).encode())
    _write(root / "DEBIAN/conffiles", f"/{ENVIRONMENT}\n".encode())
    sums = [f"{hashlib.md5(f.read_bytes()).hexdigest()}  {f.relative_to(root)}\n" for f in files]
    _write(root / "DEBIAN/md5sums", "".join(line for line in sums if not line.endswith(f"{ENVIRONMENT}\n")).encode())
    _settle(root, release)
    package = to / f"{NAME}_{release.version}_{machine}.deb"
    # What several threads write depends on how many there are.
    command = ["dpkg-deb", "--root-owner-group", "--threads-max=1", "-Zxz", "--build", str(root), str(package)]
    run(command, **release.env)
    return package


def rpm(root: Path, release: Release, to: Path) -> Path:
    """Makes the .rpm of `tree` in the directory `to`."""
    _settle(root, release)
    work = root.parent / "rpm"
    values = {
        "UPSTREAM": release.upstream,
        "REVISION": release.revision,
        "GLIBC": _glibc(root),
        "TREE": str(root),
        "SYSUSERS": (UNITS / "sysusers.conf").read_text().rstrip(),
        "CHANGELOG": _rpm_changelog(release),
        "MAY_RESTART": "true",
    }
    spec = work / f"{NAME}.spec"
    _write(spec, filled(PACKAGING / "rpm" / spec.name, values).encode())
    defined = {
        "_topdir": str(work),
        "_rpmdir": str(to),
        "_dbpath": str(work / "db"),
        "_rpmfilename": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
        "_buildhost": "localhost",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
        "_build_id_links": "none",
        "_binary_payload": "w6.xzdio",
    }
    defines = [word for name, value in defined.items() for word in ("--define", f"{name} {value}")]
    run(["rpmbuild", "-bb", "--quiet", *defines, str(spec)], **release.env)
    return to / f"{NAME}-{release.version}.{os.uname().machine}.rpm"


def filled(template: Path, values: dict[str, str]) -> str:
    """`@NAME@` becomes its value, a line `@FILE@` the text of packaging/scripts/FILE, filled in the same way."""

    def value(found: re.Match[str]) -> str:
        if found[1] in values:
            return values[found[1]]
        return filled(PACKAGING / "scripts" / found[1], values).rstrip("\n")

    return re.sub(r"@([A-Z_]+|[a-z]+\.sh)@", value, template.read_text())


def _rpm_changelog(release: Release) -> str:
    changes = re.sub(r"(?m)^  \* ", "- ", release.changes).rstrip()
    return f"* {release.at:%a %b %d %Y} {release.who} - {release.version}\n{changes}"


def _glibc(root: Path) -> str:
    return ".".join(map(str, needs(elf_files(root / PROGRAM)).glibc))


def _said(executable: Path, argument: str) -> str:
    """In an environment that is the same everywhere: help is as wide as the terminal."""
    env = {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "COLUMNS": "80"}
    return subprocess.run([executable, argument], env=env, check=True, capture_output=True, text=True).stdout


def _zipped(text: str) -> bytes:
    return gzip.compress(text.encode(), 9, mtime=0)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _settle(root: Path, release: Release) -> None:
    """Modes and times that do not depend on who builds, and when."""
    scripts = {root / "DEBIAN" / name for name in ("postinst", "prerm", "postrm")}
    executables = {root / PROGRAM / NAME, *scripts}
    at = release.at.timestamp()
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            usual = 0o755 if path.is_dir() or path in executables else 0o644
            path.chmod(MODES.get(path.relative_to(root), usual))
        os.utime(path, (at, at), follow_symlinks=False)
