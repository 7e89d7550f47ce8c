"""An agent reduced to its guard, to be killed: `agent_with_guard.py ROLE RUNTIME`, ROLE agent, bootloader or lost.

agent       starts a guard, and the fake launcher (with an EngineCore in a session of its own) through it
bootloader  is what PyInstaller's one-file program is: unpacks a directory, runs an agent, removes the directory
lost        an agent that kills its guard and then ends the orphans
Writes its pids to RUNTIME/pids, as JSON, when everything runs.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import trio
from engine import until  # its neighbour: this file is run as a program

from xim_agent.engine.guard import Guard, GuardLost, die_with_parent
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.tree import descendants

FAKE = Path(__file__).parent / "fake_vllm.py"


async def serve(guard: Guard, runtime: Path, *, lose_guard: bool) -> None:
    sock = str(runtime / "engine.sock")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    argv = [str(FAKE), "serve", "/model", "--uds", sock]
    child = await guard.spawn(argv, env, "/", Leftovers(str(runtime / "leftovers.json"), [sock], []))
    wanted = 2 + (env.get("FAKE_VLLM_CORE") == "1")
    notes = runtime / "leftovers.json"
    await until(lambda: len(descendants(os.getpid())) >= wanted)
    await until(lambda: env.get("FAKE_VLLM_SHM") != "1" or "psm_" in notes.read_text())
    tree = [p.pid for p in descendants(os.getpid())]
    pids = {"agent": os.getpid(), "guard": guard.pid, "vllm": child.pid, "tree": tree}
    (runtime / "pids.new").write_text(json.dumps(pids))
    (runtime / "pids.new").rename(runtime / "pids")
    if lose_guard:
        os.kill(guard.pid, signal.SIGKILL)
        try:
            await child.wait()
        except GuardLost:
            await guard.end_orphans(str(notes))
            assert not descendants(os.getpid())
            (runtime / "orphans ended").touch()
    await trio.sleep_forever()


def main() -> None:
    role, runtime = sys.argv[1], Path(sys.argv[2])
    if role == "bootloader":
        (runtime / "_MEIabc").mkdir()
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, "bundled", str(runtime)])
        shutil.rmtree(runtime / "_MEIabc")
        return
    if role == "bundled":
        sys._MEIPASS = str(runtime / "_MEIabc")  # type: ignore[attr-defined]
        die_with_parent()
    guard = Guard.start()
    trio.run(lambda: serve(guard, runtime, lose_guard=role == "lost"))


if __name__ == "__main__":
    main()
