"""Packages for tests: built in a checkout of their own, whose version a test may raise."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "xerotier-xim-agent"

# What the units start, in the least that every Debian has. It says READY, and ends at SIGTERM.
PROGRAM = """#!/usr/bin/perl
use Socket;
if ($ARGV[0] ne "run") { print "what $ARGV[0] prints: .dots, 'quotes', back\\\\slash\\n.line\\n"; exit 0; }
sub say_to { socket(my $s, AF_UNIX, SOCK_DGRAM, 0); send($s, $_[0], 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET})); }
$SIG{TERM} = sub { exit 0 };
say_to("READY=1");
while (1) { sleep 20; say_to("WATCHDOG=1"); }
"""


def checkout(place: Path) -> Path:
    """What build/package needs, so that it can be changed."""
    for name in ("build", "packaging"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "xim_agent").mkdir()
    shutil.copy(ROOT / "xim_agent/__init__.py", place / "xim_agent")
    return place


def raise_revision(place: Path) -> str:
    """The next version of the package in a checkout; returns it."""
    changelog = place / "packaging/changelog"
    text = changelog.read_text()
    old = text.split("(")[1].split(")")[0]
    upstream, revision = old.split("-")
    new = f"{upstream}-{int(revision) + 1}"
    entry = text.split("\n\n", 1)[0].replace(old, new) + "\n\n  * Packaged again.\n\n" + text.split("\n\n", 2)[2]
    changelog.write_text(f"{entry.rstrip()}\n\n{text}")
    return new


def results(place: Path) -> Path:
    """Stands for what build/freeze made: a program that prints, and one ELF file."""
    (place / "onedir/_internal").mkdir(parents=True)
    program = place / "onedir" / NAME
    program.write_text(PROGRAM)
    program.chmod(0o755)
    shutil.copy("/bin/true", place / "onedir/_internal/libtrue.so.1")
    (place / "onedir/_internal/libtrue.so").symlink_to("libtrue.so.1")
    (place / f"{NAME}.cdx.json").write_text('{"metadata": {"component": {}}}')
    return place


def build(place: Path, dist: Path, to: Path, *kinds: str) -> list[Path]:
    """Runs build/package of a checkout with `kinds` (--deb, --rpm); the paths that it printed."""
    command = [place / "build/package", *kinds, "--from", dist, "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]
