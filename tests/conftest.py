"""What every test may use. `build/test` makes what the session fixtures name and says where in the environment."""

import faulthandler
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what it puts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines are noisy, and a test is never timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
sys.path.insert(0, str(Path(__file__).parent))  # `from fakes.x import …`


def _made(variable: str) -> str:
    value = os.environ.get(variable)
    assert value, f"{variable} is not set: run the tests through ./build/test"
    assert Path(value).exists(), f"{variable}={value} does not exist: run ./build/test"
    return value


@pytest.fixture(scope="session")
def vllm_launcher() -> str:
    """Path of a real `vllm`."""
    return _made("XIM_TEST_VLLM")


@pytest.fixture(scope="session")
def toy_model() -> Path:
    """Directory of the toy Llama of build/toy_model.py."""
    return Path(_made("XIM_TEST_TOY_MODEL"))


@pytest.fixture(scope="session")
def agent_exe() -> Path:
    """The frozen executable, made from the sources under test."""
    return Path(_made("XIM_TEST_EXE"))


@pytest.fixture(scope="session")
def agent_onedir(agent_exe: Path) -> Path:
    """The same as one directory, beside it."""
    path = agent_exe.parent / "onedir" / agent_exe.name
    assert path.exists(), f"{path} does not exist: run ./build/test"
    return path


@pytest.fixture(scope="session")
def image_data(agent_onedir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a daemon of fakes/docker.py finds `xim-test/xim-router` and `xim-test/xim-vllm-cpu`; minutes and 5 GB."""
    from fakes import images
    from fakes.docker import daemon, data_root

    faulthandler.cancel_dump_traceback_later()  # nothing hangs
    with data_root(tmp_path_factory.mktemp("images")) as data:
        with daemon(data, network=True) as docker, images.served(images.engine_wheels()) as wheels:
            images.base(docker)
            for name in ("xim-router", "xim-vllm-cpu"):
                images.build(docker, name, agent_onedir.parent, wheels)
        yield data


@pytest.fixture
def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def _errors(request: pytest.FixtureRequest) -> Iterator[list[logging.LogRecord]]:
    handler = _Errors()
    logger = logging.getLogger("xim_agent")
    logger.addHandler(handler)
    yield handler.records
    logger.removeHandler(handler)
    if "error_logs" not in request.fixturenames:
        assert not handler.records, f"unexpected errors were logged: {[r.getMessage() for r in handler.records]}"


@pytest.fixture
def error_logs(_errors: list[logging.LogRecord]) -> list[logging.LogRecord]:
    """Error records so far. A test that asks for this fixture expects some and looks at them itself."""
    return _errors
