"""Licences of the bundled distributions, read from their metadata."""

from importlib.metadata import Distribution, distributions
from typing import Any

import click


def _licence(dist: Distribution) -> str:
    meta: Any = dist.metadata
    if expression := meta.get("License-Expression"):
        return str(expression)
    classified = [c.rsplit(" :: ", 1)[-1] for c in meta.get_all("Classifier") or [] if c.startswith("License ::")]
    return ", ".join(classified) or (meta.get("License") or "see its texts").splitlines()[0]


@click.command("licenses", help="Print the licences of everything in this program")
def command() -> None:
    for dist in sorted(distributions(), key=lambda d: d.name.lower()):
        click.echo(f"## {dist.name} {dist.version}: {_licence(dist)}")
        for file in dist.files or []:
            if any(word in file.name.upper() for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING")):
                try:
                    text = file.locate().read_text(encoding="utf-8")  # type: ignore[attr-defined]
                except (OSError, UnicodeDecodeError):
                    continue
                click.echo(f"\n{text.strip()}\n")
