"""Router and agent in one tree: the try-out. The same parts and the same protocol over loopback as in two processes."""

import json
import logging
import os
import re
import socket
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from xim_agent.cli.ask import ask
from xim_agent.cli.common import configured
from xim_agent.cli.options import AgentCommand
from xim_agent.cli.progress import Display
from xim_agent.config.fields import OPTIONS
from xim_agent.errors import AgentError, Exit

QUESTION = "What is the capital of France? Answer in one sentence."
_DEFAULT_PORT = 8080
_FIXED = {"join_key", "join_key_file", "router_url", "allow_insecure", "config_path", "name", "on_final_error"}


@dataclass(frozen=True)
class Options:
    model: Path
    once: str | None
    port: int | None
    data: Path


def _listen_port(wanted: int | None) -> int:
    """`wanted`, else 8080, else any free port. Raises AgentError when the wanted one is taken."""
    for port in (wanted,) if wanted is not None else (_DEFAULT_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if wanted is not None:
                    raise AgentError(
                        "port_in_use",
                        f"cannot listen on 127.0.0.1:{port}: {error.strerror}",
                        hint="choose another with --port, or leave it out",
                        exit_code=Exit.CONFIG,
                    ) from error
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 is always free")


def _served_name(model: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.resolve().name).strip("-._")
    return name[:128] or "model"


async def _until_ready(made: Any, display: Display) -> None:
    """Shows what the agent does until its engine is proven. Cancelled when the agent ends.

    Raises AgentError when this model will not be served without somebody doing something.
    """
    import trio

    said: set[str] = set()
    while not made.engine.ready:
        for condition in made.health.conditions():
            hint = made.health.hints.get(condition.code, "")
            if condition.code == "model_refused" or (condition.code == "engine_failed" and made.engine.degraded):
                raise AgentError(condition.code, condition.text, hint=hint, exit_code=1)
            if condition.text not in said:
                said.add(condition.text)
                display.say(f"{condition.text} [{condition.code}]" + (f"; {hint}" if hint else ""))
        progress = made.assignment.progress or made.engine.progress
        if not made.identity.statistics().enrolled:
            display.show("enrolling")
        elif progress is None:
            display.show("assignment")
        elif progress.stage == "engine":
            display.show(f"vLLM: {progress.text or 'starting'}")
        else:
            display.transfer(progress)
        await trio.sleep(0.2)


def _welcome(url: str, key: str, name: str, dashboard: str) -> str:
    messages = [{"role": "user", "content": "Say hello in French."}]
    body = json.dumps({"model": name, "messages": messages, "max_tokens": 99})  # the demo model can go on for minutes
    return f"""
  OpenAI base URL   {url}/v1
  API key           {key}
  Model             {name}
  Dashboard         {dashboard}

  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'

  Ctrl-C stops: running answers finish first.
"""


def _publish(options: Options, display: Display) -> Any:
    """Publishes the model and assigns it to every agent. Unchanged files are read once and nothing is stored twice."""
    from xim_agent.cli.router_models import publish_model
    from xim_agent.router import catalog
    from xim_agent.router.store import Store

    with Store.open(options.data / "router") as store:
        published = publish_model(store, options.model, _served_name(options.model), None, display)
        catalog.assign(store.db, published.name, published.revision, None)
    return published


async def _agent(config: Any, guard: Any, stop: Any, over: Any, *, task_status: Any) -> None:
    """The whole life of the agent; reports its parts once its tree runs, and cancels the scope `over` at its end."""
    import trio

    from xim_agent import agent
    from xim_agent.assemble import assemble

    async with assemble(config, guard) as made, trio.open_nursery() as nursery:
        await nursery.start(partial(agent.run, made.parts, stop=stop))
        task_status.started(made)
    over.cancel()


async def _session(options: Options, config: Any, guard: Any) -> int:
    import trio

    from xim_agent.router import catalog
    from xim_agent.router.app import make_app, serve
    from xim_agent.router.dashboard import sessions
    from xim_agent.router.store import Store, router_lock

    stop, answered = trio.Event(), False
    with router_lock(options.data / "router"), Display() as display:
        port = _listen_port(options.port)
        # Left behind by Ctrl-C: what a cut publish leaves is found by the next one.
        published = await trio.to_thread.run_sync(_publish, options, display, abandon_on_cancel=True)
        with Store.open(options.data / "router") as store:
            token = sessions.make_link(store.db, time.time(), at_start=True)
            async with trio.open_nursery() as router:
                (url, *_) = await router.start(partial(serve, make_app(store), f"127.0.0.1:{port}"))
                now = time.time()
                _, join_key = store.create_join_key(
                    project="local", region="local", uses=1, expires_at=now + 600, now=now
                )
                api_key = catalog.create_api_key(store.db, "local", now)
                config = replace(config, join_key=join_key, router_url=url)
                async with trio.open_nursery() as tree:
                    made = await tree.start(partial(_agent, config, guard, stop, tree.cancel_scope))
                    await _until_ready(made, display)
                    display.finish()
                    answered = await _use(options, published, url, api_key, sessions.link(url, token))
                    if options.once is not None:
                        stop.set()
                router.cancel_scope.cancel()
    return Exit.OK if answered or options.once is None else 130


async def _use(options: Options, published: Any, url: str, key: str, dashboard: str) -> bool:
    """The one question of `--once`, or the welcome and a first question. True when there was an answer."""
    if options.once is not None:
        await ask(url, key, published.name, options.once)
        return True
    click.echo(_welcome(url, key, published.name, dashboard), err=True)
    if published.task != "generate":
        return True
    click.echo(f"> {QUESTION}", err=True)
    try:
        await ask(url, key, published.name, QUESTION)
    except AgentError as error:
        # Not every model can chat; the try-out goes on, and what failed is seen.
        click.echo(f"the model did not answer: {error.message}", err=True)
    return True


def _default_data() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "xerotier" / "local"


_ONLY = frozenset(o.attr for o in OPTIONS) - _FIXED


@click.command(
    "local",
    cls=AgentCommand,
    only=_ONLY,
    help="Router and agent in one process, for a try-out without an account.\n\nPublishes and assigns the model of "
    "--model, enrolls, fetches it into the cache, starts vLLM, asks one question, and serves an OpenAI API on "
    "127.0.0.1 until Ctrl-C.",
)
@click.option(
    "--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
    help="Model directory to serve",
)  # fmt: skip
@click.option("--once", metavar="PROMPT", help="Print only the answer to PROMPT on stdout, then end")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the API  [default: 8080, else any free one]")
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where router, agent and model cache keep their files  [default: ~/.cache/xerotier/local]",
)  # fmt: skip
def command(model: Path, once: str | None, port: int | None, data: Path | None, **flags: Any) -> int:
    data = (data or _default_data()).absolute()
    defaults = {
        "config_path": str(data / "agent"),
        "model_cache_path": str(data / "models"),
        "metrics_port": "0",
        "log_level": "warning",
    }
    for option in OPTIONS:
        if option.attr in _FIXED:
            os.environ.pop(option.env, None)  # an agent set up on this machine keeps its own state and credential
    config = configured(flags, defaults)
    if config.log_level == "warning":
        # vLLM warns about much that nobody can change; its errors stay.
        logging.getLogger("xim_agent.engine.vllm").setLevel(logging.ERROR)

    from xim_agent.engine.guard import Guard, die_with_parent
    from xim_agent.router.server import raise_file_limit

    die_with_parent()
    guard = Guard.start()
    raise_file_limit()

    import trio

    try:
        return int(trio.run(_session, Options(model, once, port, data), config, guard))
    finally:
        guard.close()
