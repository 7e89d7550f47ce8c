"""Licences of what the program is made of: distributions tell their own; the rest was noted when it was frozen."""

import json
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import click

NOTED = Path(__file__).parent / "components.json"
"""Written by build/components.py; there in the frozen program only."""


def licence_of(dist: Distribution) -> str:
    """An SPDX expression, or what the distribution says in its own words."""
    meta: Any = dist.metadata
    if expression := meta.get("License-Expression"):
        return str(expression)
    classified = [c.rsplit(" :: ", 1)[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    return ", ".join(classified) or (meta.get("License") or "see its texts").splitlines()[0]


@click.command("licenses", help="Print the licences of everything in this program")
def command() -> None:
    for part in json.loads(NOTED.read_text()) if NOTED.exists() else []:
        inside = f" (inside of {part['part_of']})" if part["part_of"] else ""
        click.echo(" ".join(f"## {part['name']} {part['version']}".split()) + f": {part['licence']}{inside}")
        if part["text"]:
            click.echo(f"\n{part['text'].strip()}\n")
    for dist in sorted(distributions(), key=lambda d: d.name.lower()):
        click.echo(f"## {dist.name} {dist.version}: {licence_of(dist)}")
        for file in dist.files or []:
            if any(word in file.name.upper() for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING")):
                try:
                    text = file.locate().read_text(encoding="utf-8")  # type: ignore[attr-defined]
                except (OSError, UnicodeDecodeError):
                    continue
                click.echo(f"\n{text.strip()}\n")
