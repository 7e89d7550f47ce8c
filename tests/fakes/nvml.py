"""The compiled nvml.c, loaded before pynvml asks for the driver's library: glibc then finds it by its SONAME."""

import ctypes
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GIB = 2**30
_loaded: list[ctypes.CDLL] = []


def load(directory: Path) -> ctypes.CDLL:
    """Once a process; from then on pynvml meets it there, and without FAKE_NVML a machine without a driver."""
    if not _loaded:
        made = directory / "libnvidia-ml.so.1"
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
        subprocess.run(["gcc", *flags, "-o", str(made), str(HERE / "nvml.c")], check=True)
        _loaded.append(ctypes.CDLL(str(made)))
    return _loaded[0]


@dataclass
class Machine:
    """The script of nvml.c. Change it and call `write`."""

    path: Path
    library: ctypes.CDLL
    driver: dict[str, Any] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    slices: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    xids: list[tuple[int, int]] = field(default_factory=list)
    hang: bool = False

    @property
    def sessions(self) -> int:
        """How often NVML is open in this process."""
        return int(self.library.fake_nvml_sessions())

    @property
    def inits(self) -> int:
        """How often it was opened: once a look while a card is lost."""
        return int(self.library.fake_nvml_inits())

    def add(self, **facts: Any) -> None:
        n = len(self.gpus)
        known = {"name": "NVIDIA A10", "uuid": f"GPU-{n}{n}{n}{n}-aaaa", "bus": f"00000000:{n + 1:02X}:00.0"}
        self.gpus.append({**known, "total": 24 * GIB, "used": GIB, "major": 8, "minor": 6, **facts})

    def write(self) -> None:
        lines = [_line("driver", self.driver)]
        for index, gpu in enumerate(self.gpus):
            lines += [_line("gpu", gpu), *(_line("slice", part) for part in self.slices.get(index, []))]
        lines += [_line("xid", {"gpu": gpu, "number": number}) for gpu, number in self.xids]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join([*lines, *(["hang"] if self.hang else [])]) + "\n")
        fresh.rename(self.path)


def _line(word: str, facts: dict[str, Any]) -> str:
    return "\t".join([word, *(f"{key}={value}" for key, value in facts.items())])


def machine(directory: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A driver and no GPU yet, for this test; `compiled`: where the library is made, which outlives it."""
    script = directory / "nvml"
    monkeypatch.setenv("FAKE_NVML", str(script))
    made = Machine(script, load(compiled))
    made.library.fake_nvml_reset()  # an earlier test's agent leaves it open, as an agent does at its end
    made.write()
    return made
