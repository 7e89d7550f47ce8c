"""The units of packaging/systemd, compared with what the agent does and with what systemd makes of them."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from xim_agent.cli.options import OPTIONS
from xim_agent.config.fields import Config
from xim_agent.config.paths import short_enough
from xim_agent.doctor.tools import _SHOW
from xim_agent.errors import FINAL
from xim_agent.notify import POLL_SECONDS, STATUS_SECONDS
from xim_agent.outside import SPARE_SECONDS, longest_stop

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "packaging" / "systemd"
ONE, MANY = "xerotier-xim-agent.service", "xerotier-xim-agent@.service"
PROGRAM = "/usr/lib/xerotier-xim-agent/xerotier-xim-agent"
Settings = dict[str, dict[str, list[str]]]


class _Values(dict[str, list[str]]):
    """A setting may be given several times."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            self[key].extend(value)
        else:
            super().__setitem__(key, value)  # type: ignore[assignment]


def settings(unit: str) -> Settings:
    found = configparser.RawConfigParser(
        strict=False, dict_type=_Values, delimiters="=", comment_prefixes="#", interpolation=None
    )
    found.optionxform = str  # type: ignore[assignment,method-assign]
    text = re.sub(r"(?m)^#.*\n", "", (PLACE / unit).read_text())
    found.read_string(text)
    return {name: {key: value.split("\n") for key, value in section.items()} for name, section in found.items()}


@pytest.fixture(params=[ONE, MANY])
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(unit: str) -> dict[str, list[str]]:
    return settings(unit)["Service"]


def test_it_is_not_restarted_exactly_after_final_errors(service: dict[str, list[str]]) -> None:
    assert [set(map(int, line.split())) for line in service["RestartPreventExitStatus"]] == [set(map(int, FINAL))]
    assert service["Restart"] == ["on-failure"]


def test_a_stop_has_the_time_that_it_takes(service: dict[str, list[str]]) -> None:
    needed = longest_stop(Config.drain_timeout_seconds) + SPARE_SECONDS
    assert service["TimeoutStopSec"] == [f"{needed:.0f}"]


def test_the_watchdog_has_room_for_a_late_look(service: dict[str, list[str]]) -> None:
    [seconds] = map(float, service["WatchdogSec"])
    assert seconds >= POLL_SECONDS
    assert seconds >= 3 * STATUS_SECONDS


def test_start_limits_are_where_systemd_reads_them(unit: str) -> None:
    found = settings(unit)
    assert {"StartLimitIntervalSec", "StartLimitBurst"} <= set(found["Unit"])
    assert not [key for key in found["Service"] if key.startswith("StartLimit")]


def test_gpus_stay_visible_and_kernels_can_be_compiled(service: dict[str, list[str]]) -> None:
    hiding = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute", "PrivateUsers"}
    assert not hiding & set(service)


def test_the_program_is_the_one_directory_build_of_the_packages(service: dict[str, list[str]]) -> None:
    assert service["ExecStart"] == [f"{PROGRAM} run"]
    assert service["NotifyAccess"] == ["main"]


def test_every_variable_is_one_of_the_agents(service: dict[str, list[str]]) -> None:
    known = {option.env for option in OPTIONS} | {"HOME", "PATH"}
    assert {line.partition("=")[0] for line in service["Environment"]} <= known
    template = (PLACE / "xim-agent.env").read_text()
    named = set(re.findall(r"(?m)^#(\w+)=", template))
    assert named
    assert named <= known
    assert not re.findall(r"(?m)^[^#\n]", template), "as it is installed it changes nothing"


def test_sockets_fit_into_the_runtime_directory() -> None:
    assert short_enough(Path("/run", settings(ONE)["Service"]["RuntimeDirectory"][0]))
    [many] = settings(MANY)["Service"]["RuntimeDirectory"]
    assert short_enough(Path("/run", many.replace("%i", "n" * 30)))


def test_instances_share_nothing() -> None:
    """What tells one agent from another has the instance's name in it; all else is the same."""
    one, many = settings(ONE), settings(MANY)
    own = {"EnvironmentFile", "Environment", "LoadCredential", "StateDirectory", "CacheDirectory", "RuntimeDirectory"}
    assert {key for key in many["Service"] if many["Service"][key] != one["Service"].get(key)} == own
    for key in own:
        values = [v for v in many["Service"][key] if not v.startswith("PATH=")]
        assert [v for v in values if "%i" not in v] == []
    assert {key for key in one["Service"] if key not in many["Service"]} == set()
    assert many["Unit"] | {"Description": []} == one["Unit"] | {"Description": []}


def test_doctor_looks_at_both() -> None:
    assert ONE in _SHOW
    assert MANY.replace("@.", "@*.") in _SHOW


def analyze(*words: str) -> str:
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def installed(unit: str, place: Path) -> str:
    """A copy of the unit that names a program which is there: of another one systemd-analyze says only that."""
    name = unit.replace("@.", "@x.")
    program = place / "program"
    shutil.copy("/bin/true", program)
    (place / name).write_text((PLACE / unit).read_text().replace(PROGRAM, str(program)))
    return str(place / name)


def test_systemd_understands_every_line(unit: str, tmp_path: Path) -> None:
    assert analyze("verify", "--man=no", "--recursive-errors=yes", installed(unit, tmp_path)) == ""


def test_it_is_exposed_no_more_than_it_must_be(unit: str, tmp_path: Path) -> None:
    analyze("security", "--offline=yes", "--no-pager", "--threshold=25", installed(unit, tmp_path))
