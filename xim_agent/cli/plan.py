"""`plan`: how vLLM would be started, and why so. Starts nothing and leaves nothing behind."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xim_agent.cli.common import configured
from xim_agent.cli.options import AgentCommand
from xim_agent.config.fields import OPTIONS, Config

if TYPE_CHECKING:
    from xim_agent.hardware.report import Hardware
    from xim_agent.mesh.messages import Task

_OTHERS = {"vllm_salt_secret", "vllm_salt_secret_file", "allow_unsafe_files"}
_ONLY = frozenset(o.attr for o in OPTIONS if o.meta["group"] == "engine") - _OTHERS | {
    "config_path", "model_cache_path", "model_cache_max_size_gb", "log_level",
}  # fmt: skip
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


_HELP = """Print how vLLM would be started for a model, and the sum behind every number.

The output can be pasted into a shell. Nothing is started or written. A model of the cache:
--model "$(xerotier-xim-agent cache path NAME)". Without --model: the hardware alone, as JSON.

With --hardware the plan is for another machine, one to be bought, say. FILE is what `plan --json` printed on a machine
like it, or written by hand, with sizes in bytes; what is left out is that of an idle machine:
{"accelerator": "nvidia", "memory_bytes": N, "devices": [{"name": "NVIDIA L40S", "memory_total_bytes": N,
"compute_capability": "8.9"}]}

\b
Exit codes:
  0   done
  2   wrong usage, no such file
  78  model, hardware or a setting cannot be used, or the model does not fit
"""


@click.command("plan", cls=AgentCommand, only=_ONLY, help=_HELP)
@click.option("--model", type=_DIRECTORY, metavar="DIR", help="Model directory, in Hugging Face's layout")
@click.option("--hardware", type=_FILE, metavar="FILE", help="Plan for this hardware, not this machine's; - is stdin")
@click.option(
    "--task",
    type=click.Choice(["generate", "embed", "score"]),
    help="What the model is for  [default: as its files say]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes in bytes")
def command(model: Path | None, hardware: Path | None, task: "Task | None", as_json: bool, **flags: Any) -> None:
    config = configured(flags)

    import json
    from functools import partial

    import trio

    from xim_agent.engine.environment import gpu_environment
    from xim_agent.engine.preview import SCHEMA, script
    from xim_agent.hardware.document import from_document, to_document
    from xim_agent.hardware.probe import probe
    from xim_agent.log import redact

    if hardware is None:
        machine = trio.run(partial(probe, env=gpu_environment(config, os.environ)))
    else:
        with click.open_file(str(hardware), "rb") as file:
            machine = from_document(file.read(), str(hardware))
    for one in machine.broken:
        click.echo(f"{one.what}; {one.cure}", err=True)
    if model is None:
        click.echo(json.dumps({"schema": SCHEMA, "hardware": to_document(machine)}, indent=2))
        return
    found = planned(config, machine, model.resolve(), task)
    click.echo(redact(json.dumps(found, indent=2) if as_json else script(found)))


def planned(config: Config, machine: "Hardware", model: Path, task: "Task | None") -> dict[str, Any]:
    """Raises AgentError as `read_model` and `command.plan` do."""
    import json

    from xim_agent.config.paths import expected_runtime_directory
    from xim_agent.engine import launcher
    from xim_agent.engine.command import plan
    from xim_agent.engine.model import read_model
    from xim_agent.engine.planner import flags_of, places
    from xim_agent.engine.preview import document
    from xim_agent.errors import AgentError
    from xim_agent.mesh.messages import Assignment, ModelRef, Serving
    from xim_agent.router.catalog import task_of

    facts = read_model(model)
    if task is None:
        task = task_of(json.loads((model / "config.json").read_bytes()), [path.name for path in model.iterdir()])
    runtime = expected_runtime_directory(config.config_path, os.environ)
    program, version, known, bitsandbytes = config.vllm_path, None, None, False
    try:
        found = launcher.find(config.vllm_path, os.environ)
        program, version, known = str(found), launcher.version(found), flags_of(runtime, found)
        bitsandbytes = launcher.has_bitsandbytes(found)
    except AgentError as error:
        if error.code != "launcher_missing":
            raise
    there = places(config, runtime, program, model, config.model_cache_path / "compile" / (version or "unknown"))
    ref = ModelRef(model.name, model.name, "", "", 0)
    assignment = Assignment("", "", 0, 0, ref, Serving(served_model_name=model.name, task=task))
    made = plan(config, assignment, machine, facts, there, known, bitsandbytes)
    ours = plan(replace(config, vllm_env=()), assignment, machine, facts, there, known, bitsandbytes).env
    secret = {pair.partition("=")[0] for pair in config.vllm_env} - set(ours)
    return document(
        made, machine, directory=str(model), vllm_version=version, flags_checked=known is not None, secret=secret
    )
