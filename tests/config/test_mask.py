import pytest
from hypothesis import given
from hypothesis import strategies as st

from xim_agent.config.config import describe
from xim_agent.config.fields import Config
from xim_agent.config.mask import masked_arguments, masked_pairs, secret_words


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--api-key", "V", "--seed", "1"], ["--api-key", "***", "--seed", "1"]),
        (["--api-key=V"], ["--api-key=***"]),
        (["--api_key", "V", "W", "--x"], ["--api_key", "***", "***", "--x"]),
        (["--hf-token", "V"], ["--hf-token", "***"]),
        (["--HF-TOKEN=V=W"], ["--HF-TOKEN=***"]),
        (["--ssl-keyfile-password", "V"], ["--ssl-keyfile-password", "***"]),
        (["--client.secret=V"], ["--client.secret=***"]),
        (["--max-num-batched-tokens", "8192"], ["--max-num-batched-tokens", "8192"]),
        (["--tokenizer", "x", "--tokenizer-mode=auto"], ["--tokenizer", "x", "--tokenizer-mode=auto"]),
        (
            ["--kv-transfer-config", '{"url": "u", "api_key": "V\\"W", "n": 3, "x": {"password":"V"}}'],
            ["--kv-transfer-config", '{"url": "u", "api_key": "***", "n": 3, "x": {"password":"***"}}'],
        ),
        (["--seed", "1", "--x="], ["--seed", "1", "--x="]),
    ],
)
def test_values_of_secret_arguments(words: list[str], shown: list[str]) -> None:
    assert list(masked_arguments(words)) == shown


@given(st.lists(st.text()))
def test_words_stay_as_many_and_names_stay(words: list[str]) -> None:
    shown = masked_arguments(words)
    assert len(shown) == len(words)
    assert [s.partition("=")[0] for s, w in zip(shown, words, strict=True) if w.startswith("-")] == [
        w.partition("=")[0] for w in words if w.startswith("-")
    ]


def test_no_value_of_a_pair_shows() -> None:
    assert masked_pairs(["HF_TOKEN=V=W", "A="]) == ("HF_TOKEN=***", "A=***")


def test_status_names_what_is_set_but_not_the_secrets() -> None:
    shown = describe(Config(vllm_args=("--api-key", "V1", "--seed=1"), vllm_env=("X=V2",)))
    assert shown["vllm_args"] == ("--api-key", "***", "--seed=1")
    assert shown["vllm_env"] == ("X=***",)


def test_what_must_not_be_seen_is_collected_from_everything_that_may_hold_it() -> None:
    arguments = ["--api-key=K1", "--hf-token", "K2", "K3", "--seed", "1", "--x", '{"password": "K4", "n": 5}']
    pairs = ["HF_TOKEN=K5=x", "VLLM_CPU_KVCACHE_SPACE=1", "AWS_SECRET_ACCESS_KEY=K6", "EMPTY_KEY="]
    urls = ["http://user:K%207@proxy:3128", "user:K8@proxy:3128", "http://proxy:3128", "http://[", ""]
    assert secret_words(arguments, pairs, urls) == {"K1", "K2", "K3", "K4", "K5=x", "K6", "K%207", "K 7", "K8"}
