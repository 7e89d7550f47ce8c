import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.config import sources
from xim_agent.config.config import Raw, describe, parse, unknown_variables
from xim_agent.config.fields import OPTIONS, PREFIX
from xim_agent.errors import AgentError, Exit

HOME = Path("/home/u")


def refuse(attr: str, word: str) -> AgentError:
    with pytest.raises(AgentError) as caught:
        parse({attr: Raw(word, "XEROTIER_AGENT_" + attr.upper())}, HOME)
    assert caught.value.exit_code == Exit.CONFIG
    return caught.value


def test_defaults_are_the_products() -> None:
    config = parse({}, HOME)
    assert config.config_path == HOME / ".config/xerotier"
    assert config.model_cache_path == HOME / ".cache/xerotier/models"
    assert (config.tensor_parallel_size, config.gpu_memory_utilization) == (1, 0.95)
    assert (config.model_cache_max_size_gb, config.metrics_port, config.log_level) == (100, 9094, "info")


@pytest.mark.parametrize(
    ("attr", "word", "part"),
    [
        ("metrics_port", "70000", "between 0 and 65535"),
        ("metrics_port", "x", "no whole number"),
        ("gpu_memory_utilization", "1.5", "between 0.05 and 1.0"),
        ("gpu_memory_utilization", "nan", "out of range"),
        ("tensor_parallel_size", "0", "between 1 and 64"),
        ("log_level", "loud", "none of trace, debug, info, warning, error"),
        ("allow_insecure", "maybe", "neither true nor false"),
        ("vllm_env", "NOVALUE", "not KEY=VALUE"),
        ("vllm_args", "'open", "cannot be split"),
    ],
)
def test_refusals_name_option_value_and_range(attr: str, word: str, part: str) -> None:
    message = refuse(attr, word).message
    assert part in message
    assert attr.upper() in message


@given(st.text(min_size=1))
def test_no_word_raises_anything_but_ours(word: str) -> None:
    for option in OPTIONS:
        error = None
        try:
            parse({option.attr: Raw(word, option.env)}, HOME)
        except AgentError as raised:
            error = raised
        assert error is None or (error.exit_code == Exit.CONFIG and option.env in error.message)


@pytest.mark.parametrize("attr", ["name", "router_url", "join_key", "vllm_salt_secret"])
def test_text_that_is_no_utf8_is_refused(attr: str) -> None:
    error = refuse(attr, os.fsdecode(b"gpu-\xff-box"))
    assert "is not UTF-8 text" in error.message
    assert error.message.isprintable()


def test_flag_over_environment_over_default_and_empty_is_unset() -> None:
    env = {"HOME": "/h", PREFIX + "METRICS_PORT": "1000", PREFIX + "MAX_NUM_SEQS": "", PREFIX + "LOG_LEVEL": "debug"}
    config = sources.load({"metrics_port": "2000"}, env, defaults={"log_level": "error", "name": "n"})
    assert (config.metrics_port, config.max_num_seqs, config.log_level, config.name) == (2000, None, "debug", "n")
    flags = {"model_cache_path": "", "metrics_port": " "}
    config = sources.load(flags, env | {PREFIX + "MODEL_CACHE_PATH": "/models"})
    assert (config.model_cache_path, config.metrics_port) == (Path("/models"), 1000)


def test_lists_split_as_a_shell_splits() -> None:
    env = {PREFIX + "VLLM_ARGS": "--a 'b c'", PREFIX + "VLLM_ENV": "K=V 'L=x y'"}
    config = sources.load({}, env)
    assert config.vllm_args == ("--a", "b c")
    assert config.vllm_env == ("K=V", "L=x y")
    assert sources.load({"vllm_args": ("--x=1",)}, dict(env)).vllm_args == ("--x=1",)


def test_secrets_leave_the_environment_and_never_show(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("xjk_a_FILE\n")
    env = {PREFIX + "VLLM_SALT_SECRET": "salty-secret", PREFIX + "JOIN_KEY_FILE": str(file)}
    config = sources.load({}, env)
    assert PREFIX + "VLLM_SALT_SECRET" not in env
    assert config.join_key == "xjk_a_FILE"
    shown = str(describe(config))
    assert "salty-secret" not in shown
    assert "FILE" not in shown.replace("_FILE", "")
    with pytest.raises(AgentError) as caught:
        sources.load({"join_key": "xjk_b_SECRET"}, {PREFIX + "JOIN_KEY_FILE": str(file)})
    assert "SECRET" not in caught.value.message


def test_systemd_credential(tmp_path: Path) -> None:
    (tmp_path / "join-key").write_text("xjk_c_CRED")
    assert sources.load({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).join_key == "xjk_c_CRED"


def test_unreadable_secret_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AgentError) as caught:
        sources.load({"vllm_salt_secret_file": str(tmp_path / "none")}, {})
    assert str(tmp_path / "none") in caught.value.message
    assert caught.value.exit_code == Exit.CONFIG


def test_a_join_key_file_matters_only_when_the_key_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "join-key"
    for path in (file, tmp_path):
        config = sources.load({}, {PREFIX + "JOIN_KEY_FILE": str(path)})
        with pytest.raises(AgentError) as caught:
            sources.join_key(config)
        assert (caught.value.code, caught.value.exit_code) == ("secret_unreadable", Exit.CONFIG)
        assert f"cannot read {path}:" in caught.value.message
    file.write_bytes(b"\xff")
    config = sources.load({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    with pytest.raises(AgentError, match="not text"):
        sources.join_key(config)
    file.write_text(" xjk_late_KEY\n")
    assert sources.join_key(config) == "xjk_late_KEY"
    file.write_text("\n")
    assert sources.join_key(config) is None
    assert sources.join_key(sources.load({}, {})) is None
    assert sources.join_key(sources.load({"join_key": "xjk_a_b"}, {})) == "xjk_a_b"


def test_unknown_variable_names_the_nearest() -> None:
    assert unknown_variables(["XEROTIER_AGENT_METRIC_PORT", "PATH"]) == [
        "XEROTIER_AGENT_METRIC_PORT is not a setting of the agent; did you mean XEROTIER_AGENT_METRICS_PORT?"
    ]


def test_every_default_is_in_its_own_range() -> None:
    for option in OPTIONS:
        low, high = option.meta["low"], option.meta["high"]
        if option.default is not None and (low is not None or high is not None):
            assert (low if low is not None else -math.inf) <= option.default <= (high if high is not None else math.inf)
