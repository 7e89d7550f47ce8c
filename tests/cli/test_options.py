"""The table of options as a command line: what a person types reaches the configuration."""

from typing import Any

import pytest
from click.testing import CliRunner

from xim_agent.cli.options import agent_command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--vllm-arg=--seed=1", "--vllm-arg=--x"], {"vllm_args": ("--seed=1", "--x")}),
        (["--vllm-arg", "--seed"], {"vllm_args": ("--seed",)}),
        (["--vllm-env", "A=-1", "--vllm-env=B=x y"], {"vllm_env": ("A=-1", "B=x y")}),
        (["--max-concurrent=-1"], {"max_concurrent": "-1"}),
        (["--insecure"], {"allow_insecure": True}),
        (["--no-auto-config"], {"auto_config": True}),
        ([], {}),
    ],
)
def test_words_reach_their_option(words: list[str], expected: dict[str, Any]) -> None:
    """Also a value that begins with a dash: vLLM's own flags do."""
    given: dict[str, Any] = {}
    command = agent_command("run", "help")(lambda **flags: given.update(flags))
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert {name: value for name, value in given.items() if value not in (None, (), False)} == expected


def test_option_without_its_value_is_named() -> None:
    result = CliRunner().invoke(agent_command("run", "help")(lambda **flags: None), ["--vllm-arg"])
    assert result.exit_code == 2
    assert "--vllm-arg" in result.stderr
