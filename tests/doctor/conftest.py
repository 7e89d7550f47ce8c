import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory with a short path that every user can enter."""
    directory = Path(tempfile.mkdtemp(prefix="xim"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def closed(open_place: Path) -> Path:
    """A directory in which a plain user can make nothing."""
    directory = open_place / "closed"
    directory.mkdir()
    directory.chmod(0o555)
    return directory
