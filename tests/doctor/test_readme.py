import re
from pathlib import Path

from xim_agent.doctor.report import CHECKS


def test_every_check_is_described() -> None:
    section = Path(__file__).parents[2].joinpath("README.md").read_text().split("## What is wrong with a machine")[1]
    rows = re.findall(r"^\| (`[a-z`, ]+) \|", section.split("\n## ")[0], re.MULTILINE)
    assert tuple(name for row in rows for name in re.findall(r"`(\w+)`", row)) == CHECKS
