"""Numbers without bounds of their own, relative paths, and words that may be secrets."""

from pathlib import Path

import pytest

from xim_agent.config import sources
from xim_agent.config.config import Raw, parse
from xim_agent.config.fields import OPTIONS, PREFIX, Option
from xim_agent.errors import AgentError, Exit

HOME = Path("/home/u")
NUMBERS = [option for option in OPTIONS if option.kind in (int, float)]
PATHS = [option for option in OPTIONS if option.kind is Path]


@pytest.mark.parametrize("word", ["inf", "-inf", "nan", "1e999", "1e308", "9" * 400])
@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.attr)
def test_every_number_is_finite_and_can_be_computed_with(option: Option, word: str) -> None:
    with pytest.raises(AgentError) as refused:
        parse({option.attr: Raw(word, option.env)}, HOME)
    assert refused.value.exit_code == Exit.CONFIG


@pytest.mark.parametrize("option", PATHS, ids=lambda option: option.attr)
def test_every_path_is_absolute(option: Option) -> None:
    assert getattr(parse({option.attr: Raw("a/b", "x")}, HOME, Path("/cwd")), option.attr) == Path("/cwd/a/b")
    assert getattr(parse({option.attr: Raw("~/b", "x")}, HOME, Path("/cwd")), option.attr) == HOME / "b"
    with pytest.raises(AgentError, match="no absolute path"):
        parse({option.attr: Raw("a/b", "x")}, HOME)


def test_a_relative_path_is_below_the_directory_the_agent_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources.load({}, {PREFIX + "VLLM_SOCKET_PATH": "vllm.sock"}).vllm_socket_path == tmp_path / "vllm.sock"


@pytest.mark.parametrize("word", ["A=hunter2 B", "A= hunter2", "'hunter2"])
def test_a_refused_list_shows_none_of_its_words(word: str) -> None:
    with pytest.raises(AgentError) as refused:
        sources.load({}, {PREFIX + "VLLM_ENV": word})
    assert "hunter2" not in refused.value.message
