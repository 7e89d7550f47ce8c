"""The table of `config/fields.py` as click options and as help text."""

from collections.abc import Callable
from typing import Any

import click

from xim_agent.config.fields import OPTIONS, Option

GROUPS = {
    "identity": "Identity and router",
    "engine": "Engine",
    "cache": "Model cache",
    "metrics": "Metrics",
    "stop": "Stop",
    "log": "Log",
}


def _flag(option: Option) -> str:
    return "--no-" + option.flag.removeprefix("--") if option.meta["off_flag"] else option.flag


def shown_default(option: Option) -> str:
    if option.meta["shown_default"]:
        return str(option.meta["shown_default"])
    if option.kind is bool:
        return "on" if option.default else "off"
    return "unset" if option.default in (None, ()) else f"{option.default}"


def help_of(option: Option) -> str:
    choices = f" ({', '.join(option.choices)})" if option.choices else ""
    repeat = "; may be repeated" if option.meta["repeat"] else ""
    return f"{option.meta['help']}{choices}{repeat}  [env: {option.env}; default: {shown_default(option)}]"


def _left(option: Option) -> str:
    if option.kind is bool:
        return _flag(option)
    word = {"Path": "PATH", "int": "N", "float": "X"}.get(option.kind.__name__, "TEXT")
    return f"{_flag(option)}{'=' if option.meta['repeat'] else ' '}{word}"


def rows(group: str, only: frozenset[str] | None = None) -> list[tuple[str, str]]:
    return [(_left(o), help_of(o)) for o in OPTIONS if o.meta["group"] == group and (only is None or o.attr in only)]


def write_options(formatter: click.HelpFormatter, only: frozenset[str] | None = None) -> None:
    for group, title in GROUPS.items():
        if found := rows(group, only):
            with formatter.section(title):
                formatter.write_dl(found)


class AgentCommand(click.Command):
    """A command that takes options of the table (`only`: some of them), shown by group."""

    def __init__(self, *args: Any, only: frozenset[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.only = only
        self.own = len(self.params)
        for option in OPTIONS:
            if only is not None and option.attr not in only:
                continue
            kind: dict[str, Any] = {"multiple": option.meta["repeat"] is not None}
            if option.kind is bool:
                # Given to any other option, click takes a value that begins with a dash for the next option.
                kind = {"is_flag": True, "flag_value": True}
            names = [_flag(option), option.attr]
            self.params.append(click.Option(names, default=None, help=help_of(option), **kind))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [r for p in self.params[: self.own] if (r := p.get_help_record(ctx)) is not None]
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        write_options(formatter, self.only)


def agent_command(
    name: str, help_text: str, only: frozenset[str] | None = None
) -> Callable[[Callable[..., None]], click.Command]:
    return click.command(name, cls=AgentCommand, help=help_text, only=only)
