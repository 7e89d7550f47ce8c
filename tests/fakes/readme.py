"""A part of README.md that is made from the code, between two marks."""

import os
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def readme_part(begin: str, made: str, end: str) -> str:
    """Fails unless README has `made` there; returns README. To write it anew: XIM_WRITE_README=1."""
    text = README.read_text()
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    wanted = before + begin + made + end + after
    if os.environ.get("XIM_WRITE_README"):
        README.write_text(wanted)
    assert text == wanted
    return text
