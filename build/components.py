"""What the executable bundles: Python distributions, what is inside of those, and libraries that are none.

The spec asks for it while it freezes. The list goes into the SBOM, and what `licenses` could not find by itself goes
into the executable.
"""

import importlib.metadata
import json
import platform
import re
import sqlite3
import ssl
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import zstandard

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from xim_agent import __version__  # noqa: E402
from xim_agent.cli.licenses import licence_of  # noqa: E402

# Shared libraries by the beginning of their names. One that is missing here stops the build: look up its licence.
LIBRARIES = {
    "libpython": "python",
    "libcrypto": "openssl",
    "libssl": "openssl",
    "libsqlite3": "sqlite",
    "libz": "zlib",
    "libbz2": "bzip2",
    "liblzma": "xz",
    "libffi": "libffi",
    "libuuid": "libuuid",
    "libgcc_s": "gcc",
    "libexpat": "python",  # its text covers expat and libmpdec; Python has them inside where they are no libraries
    "libmpdec": "python",
}
ALWAYS = ("bootloader", "python", "zstd")  # zstd is inside of the distribution zstandard, which does not say so


@dataclass(frozen=True)
class Component:
    """`text` is empty where the licence of the distribution `part_of`, or the distribution itself, has it."""

    name: str
    version: str
    licence: str
    kind: str = "library"  # or distribution, or npm
    text: str = ""
    part_of: str = ""


def _library(key: str) -> Component:
    """An empty version: the library does not tell it."""
    bootloader = importlib.metadata.distribution("pyinstaller")
    name, version, licence = {
        "bootloader": ("PyInstaller bootloader", bootloader.version, "GPL-2.0-or-later WITH Bootloader-exception"),
        "python": ("Python", platform.python_version(), "PSF-2.0"),
        "openssl": ("OpenSSL", ssl.OPENSSL_VERSION.split()[1], "Apache-2.0"),
        "sqlite": ("SQLite", sqlite3.sqlite_version, "blessing"),
        "zlib": ("zlib", zlib.ZLIB_RUNTIME_VERSION, "Zlib"),
        "bzip2": ("bzip2", "", "bzip2-1.0.6"),
        "xz": ("liblzma", "", "0BSD"),
        "libffi": ("libffi", "", "MIT"),
        "libuuid": ("libuuid", "", "BSD-3-Clause"),
        "gcc": ("libgcc", "", "GPL-3.0-or-later WITH GCC-exception-3.1"),
        "zstd": ("zstd", ".".join(map(str, zstandard.ZSTD_VERSION)), "BSD-3-Clause"),
    }[key]
    if key == "bootloader":
        (path,) = [p for p in bootloader.files or [] if p.name == "COPYING.txt"]
        text = path.read_text()
    else:
        text = (HERE / "licences" / f"{key}.txt").read_text()
    return Component(name, version, licence, text=text)


def _vendored() -> list[Component]:
    """What the dashboard has from npm. The text beside each begins with its name and version."""
    found = []
    for path in sorted((HERE.parent / "xim_agent/router/dashboard/vendor").glob("*.txt")):
        text = path.read_text()
        known = re.match(r"(\S+) (\d+(?:\.\d+)+)[, ].*The MIT License", text, re.DOTALL)
        if known is None:
            sys.exit(f"freeze: {path} does not begin with a name and a version, or is no MIT licence")
        found.append(Component(known[1], known[2], "MIT", "npm", text))
    return found


def _inside(distribution: importlib.metadata.Distribution) -> list[Component]:
    """What its own SBOMs (PEP 770) name: for a wheel made of other languages, what was compiled into it."""
    found = []
    for path in distribution.files or []:
        if path.parent.name != "sboms" or path.suffix != ".json":
            continue
        for part in json.loads(path.read_text()).get("components", []):
            licences = [e.get("expression") or e["license"].get("id") for e in part.get("licenses", [])]
            if part["name"] == "openssl" and not licences:  # the C library; the crate of that name says its own
                licences = ["Apache-2.0"]
            licence = " AND ".join(licences)
            found.append(Component(part["name"], part.get("version", ""), licence, part_of=distribution.name))
    return found


def components(binaries: Iterable[str], distributions: Iterable[str]) -> list[Component]:
    """For the bundled files `binaries` (paths in the bundle) and `distributions`, sorted.

    Ends the program when no licence is known for one of the libraries.
    """
    keys = set(ALWAYS)
    for name in sorted(Path(b).name for b in binaries):
        if not name.startswith("lib"):
            continue  # an extension module: its distribution's, or Python's
        known = [key for prefix, key in LIBRARIES.items() if re.match(rf"{prefix}(?![a-z])", name)]
        if not known:
            sys.exit(f"freeze: no licence is known for {name}; add it to build/components.py and build/licences/")
        keys |= set(known)
    found = [_library(key) for key in keys]
    found += _vendored()
    found += [Component("xerotier-xim-agent", __version__, "MIT", text=(HERE.parent / "LICENSE").read_text())]
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        found += [
            Component(distribution.name, distribution.version, licence_of(distribution), "distribution"),
            *_inside(distribution),
        ]
    return sorted(found, key=lambda c: (c.part_of, c.name.lower(), c.version))


def write(found: Iterable[Component], path: Path) -> str:
    """As JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(c) for c in found], indent=1))
    return str(path)
