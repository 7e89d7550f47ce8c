"""The installed vLLM: found, startable, of which version, and whether it knows what the agent asks of it."""

from collections.abc import Callable
from pathlib import Path

from xim_agent.doctor.report import Finding, failure, from_error, ok, warning
from xim_agent.errors import AgentError


def installation(launcher: Path, version: str, flags_asked: bool, dry_run: Callable[[], tuple[str, ...]]) -> Finding:
    """`dry_run` plans a small model and returns its warnings; it raises AgentError as the planner does.

    Blocking: reads the launcher's first line. Raises OSError.
    """
    if interpreter := missing_interpreter(launcher):
        text = f"{launcher} cannot be started: its interpreter {interpreter} does not exist"
        return failure("vllm", text, "repair the installation (make its virtual environment anew), or set VLLM_PATH")
    try:
        warnings = dry_run()
    except AgentError as error:
        return from_error("vllm", error)
    asked = "knows every flag that is needed" if flags_asked else "not asked yet for its flags (a start proves them)"
    text = f"{launcher}, version {version}, {asked}"
    if warnings:
        return warning("vllm", f"{text}; {'; '.join(warnings)}", "`xerotier-xim-agent plan` shows the sums behind it")
    return ok("vllm", text)


def missing_interpreter(launcher: Path) -> str | None:
    """Of a script's #! line; None for programs, and where it is there. Raises OSError."""
    with launcher.open("rb") as file:
        first = file.read(4096).partition(b"\n")[0]
    words = first.removeprefix(b"#!").split() if first.startswith(b"#!") else []
    if not words:
        return None
    interpreter = words[0].decode(errors="replace")
    return None if Path(interpreter).exists() else interpreter
