"""What the ELF files of a build ask of the machine that runs it, read with objdump of binutils."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LIBC = re.compile(r"(libc|libm|libdl|libpthread|librt|libutil|ld-linux-[\w-]+)\.so\.\d+")
_VERSION = re.compile(r"GLIBC_(\d+)\.(\d+)")


@dataclass(frozen=True)
class Needs:
    glibc: tuple[int, int]
    """Lowest version of glibc that it runs on."""
    because: Path
    """A file that needs that version."""
    foreign: frozenset[str]
    """Libraries, other than those of glibc, that are not among the files."""
    places: frozenset[str]
    """Directories outside of the build where they look for libraries."""


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def elf_files(directory: Path) -> list[Path]:
    return [f for f in sorted(directory.rglob("*")) if f.is_file() and _is_elf(f)]


def needs(files: Iterable[Path]) -> Needs:
    """What `files` (one or more, all ELF) need together. Raises CalledProcessError when objdump fails."""
    found: dict[Path, tuple[int, int]] = {}
    wanted: set[str] = set()
    places: set[str] = set()
    names = set()
    for file in files:
        names.add(file.name)
        command = ["objdump", "--private-headers", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[file] = max(((int(a), int(b)) for a, b in _VERSION.findall(text)), default=(0, 0))
        for path in re.findall(r"^\s+R(?:UN)?PATH\s+(\S+)", text, re.MULTILINE):
            places |= {place for place in path.split(":") if not place.startswith("$ORIGIN")}
        wanted |= set(re.findall(r"^\s+NEEDED\s+(\S+)", text, re.MULTILINE))
    because = max(found, key=lambda file: found[file])
    foreign = {name for name in wanted - names if not _LIBC.fullmatch(name)}
    return Needs(found[because], because, frozenset(foreign), frozenset(places))
