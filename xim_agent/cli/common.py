"""What the commands share: configuration with logging set up, and a router client with an identity."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from xim_agent import log
from xim_agent.config import sources
from xim_agent.config.fields import OPTIONS, PREFIX, Config
from xim_agent.config.mask import secret_words

IDENTITY = frozenset(
    {
        "join_key",
        "join_key_file",
        "router_url",
        "allow_insecure",
        "name",
        "config_path",
        "max_concurrent",
        "model_cache_path",
        "model_cache_max_size_gb",
        "log_level",
        "log_format",
    }
)


def configured(flags: Mapping[str, Any], defaults: Mapping[str, str] | None = None) -> Config:
    """Secrets are out of the environment, of what others can see of this process, and of every log line when this
    returns; so call it before the first fork.
    """
    from xim_agent.cli.private import keep_private

    log.setup()
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    secret = [option for option in OPTIONS if option.meta["secret"] or option.meta["repeat"]]
    # First: with a wrong setting the process may stay, too.
    keep_private([*proxies, *(option.env for option in secret)], [option.flag for option in secret])
    config = sources.load(flags, os.environ, defaults)
    words = secret_words(config.vllm_args, [*config.vllm_env, *_others(os.environ)], ())
    payload = (config.join_key or "").partition("_")[2].partition("_")[2]  # the secret part also without its head
    log.hide(config.join_key, payload, kind="join key")
    log.hide(config.vllm_salt_secret, kind="salt secret")
    log.hide(*secret_words((), (), proxies.values()), kind="proxy password")
    log.hide(*words, kind="value of a secret argument or variable")
    log.setup(config.log_level, config.log_format)
    return config


def ignore(_: Any) -> None:
    pass


def asked(
    reach: Callable[..., Awaitable[Any]],
    flags: Mapping[str, Any],
    name: str,
    arguments: Mapping[str, Any],
    report: Callable[[Any], None] = ignore,
) -> Any:
    """What `reach` gets for `name`; of the log only errors are shown: what is worth saying is in the result."""
    import trio

    config = configured(flags)
    if config.log_level in ("info", "warning"):
        log.set_level("error")
    return trio.run(reach, config, name, arguments, report)


def _others(environ: Mapping[str, str]) -> list[str]:
    """KEY=VALUE of what is not ours and no name of a file: vLLM inherits it, and may print it."""
    ending = ("_FILE", "_PATH", "_DIR", "_DIRECTORY", "_SOCK")
    return [
        f"{name}={value}"
        for name, value in environ.items()
        if not name.startswith(PREFIX) and not name.endswith(ending) and not os.access(value, os.F_OK)
    ]


@asynccontextmanager
async def identity(config: Config) -> AsyncIterator[Any]:
    """(identity service, router client) over the locked state directory, for commands that make one call."""
    from xim_agent.assemble import make_identity, open_store, skew_condition
    from xim_agent.clock import SystemClock
    from xim_agent.engine.environment import gpu_environment
    from xim_agent.hardware.probe import probe
    from xim_agent.health import Health
    from xim_agent.mesh.client import RouterClient

    clock = SystemClock()
    health = Health(clock.now)
    hardware = await probe(env=gpu_environment(config, os.environ))
    store = await open_store(config.config_path)
    try:
        async with RouterClient(
            insecure=config.allow_insecure, clock=clock, on_skew=lambda skew: skew_condition(health, skew)
        ) as router:
            yield make_identity(config, store, router, health, lambda: hardware), router
    finally:
        store.close()
