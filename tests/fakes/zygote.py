"""Run below failpoints.c: forks a fresh agent or router for each crash, which costs milliseconds instead of a start.

Reads a JSON object a line from stdin and answers each with one on stdout: `start` gives the pid of a new process (of a
router once it listens), `wait` how it ended, `kill` ends it and tells whether it was dead before.
"""

import ctypes
import encodings.idna  # noqa: F401 what httpx and its like import at the first call, every child would import again
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import certifi  # noqa: F401
import httpcore  # noqa: F401
import trio

from xim_agent.assemble import make_identity
from xim_agent.clock import SystemClock
from xim_agent.config.fields import Config
from xim_agent.errors import AgentError
from xim_agent.hardware.report import Cpu, Hardware
from xim_agent.health import Health
from xim_agent.identity.store import StateStore
from xim_agent.mesh.client import RouterClient
from xim_agent.router.app import make_app, serve
from xim_agent.router.store import Store

library = ctypes.CDLL(None)
HARDWARE = Hardware("cpu", (), Cpu("any", 1, 1), (0,), 1.0, 10**9, 10**9, 10**9)  # probing it would start threads


def arm(task: dict[str, Any]) -> None:
    fail = [task.get("directory", ""), task.get("log", ""), task.get("at", 0), task.get("how", "before")]
    fail.append(task.get("only", ""))
    library.failpoint_arm(*(value.encode() if isinstance(value, str) else value for value in fail))


async def agent(task: dict[str, Any]) -> None:
    """Enrolls, or refreshes when it is enrolled."""
    config = Config(config_path=Path(task["state"]), join_key=task.get("join_key"))
    arm({"directory": task["state"], **task})
    with StateStore.open(config.config_path) as store:
        clock = SystemClock()
        async with RouterClient(insecure=False, clock=clock, on_skew=lambda skew: None) as router:
            await make_identity(config, store, router, Health(clock.now), lambda: HARDWARE).enroll_once()


async def router(task: dict[str, Any], listening: Callable[[], None]) -> None:
    directory = Path(task["data"])
    with Store.open(directory) as store:
        async with trio.open_nursery() as nursery:
            listen = f"127.0.0.1:{task['port']}"
            await nursery.start(partial(serve, make_app(store), listen))
            arm({"directory": str(directory), **task})
            listening()
            await trio.sleep_forever()


def child(task: dict[str, Any], ready: int) -> int:
    try:
        if task["what"] == "router":
            trio.run(router, task, lambda: os.write(ready, b"."))
        else:
            trio.run(agent, task)
    except AgentError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def start(task: dict[str, Any]) -> int:
    told, ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(told)
            code = child(task, ready)
        finally:
            os._exit(code)
    os.close(ready)
    if task["what"] == "router":
        os.read(told, 1)
    os.close(told)
    return pid


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        if task["do"] == "start":
            answer: dict[str, Any] = {"pid": start(task)}
        elif task["do"] == "kill":
            dead, _ = os.waitpid(task["pid"], os.WNOHANG)
            if not dead:
                os.kill(task["pid"], signal.SIGKILL)
                os.waitpid(task["pid"], 0)
            answer = {"dead": bool(dead)}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(task["pid"], 0)[1])}
        print(json.dumps(answer), flush=True)


main()
