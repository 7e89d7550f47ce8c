from pathlib import Path

import pytest
from fakes.nvml import Machine, machine


@pytest.fixture
def nvml(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a driver and no GPU yet; what runs is pynvml."""
    return machine(tmp_path, tmp_path_factory.getbasetemp(), monkeypatch)
