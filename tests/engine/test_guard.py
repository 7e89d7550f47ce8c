"""No process, socket or shared memory outlives the agent, however the agent dies."""

import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.engine import alive, shm, until
from fakes.user import NOBODY

from xim_agent.engine.guard import Guard
from xim_agent.engine.leftovers import Leftovers
from xim_agent.engine.tree import descendants
from xim_agent.prctl import keep_memory_private

AGENT = Path(__file__).parent.parent / "fakes" / "agent_with_guard.py"
GONE_SECONDS = 10.0  # what the agent promises
SESSIONS = Path("/proc/self/autogroup").exists()  # the kernel shares its cores out by session
HARDEST = {"FAKE_VLLM_CORE": "1", "FAKE_VLLM_SHM": "1"}


def nothing(runtime: Path) -> Leftovers:
    return Leftovers(str(runtime / "leftovers.json"))


async def test_a_program_runs_in_its_own_session_with_both_pipes(guard: Guard, runtime: Path) -> None:
    script = "echo out; echo err >&2; read line; echo stdin $? pwd $PWD env $A session $(ps -o sid= -p $$) $$; exit 7"
    child = await guard.spawn(
        ["/bin/sh", "-c", script], {"A": "b", "PATH": os.environ["PATH"]}, str(runtime), nothing(runtime)
    )
    assert await child.wait() == 7
    out = b"".join([bytes(chunk) async for chunk in child.stdout])
    *words, session, pid = out.decode().split()
    assert " ".join(words) == f"out stdin 1 pwd {runtime} env b session"
    assert session == pid == str(child.pid)
    assert await child.stderr.receive_some() == b"err\n"
    await child.aclose()


def standing(pid: int) -> tuple[int, int, str]:
    """How a process stands when others want its core: niceness, policy, and niceness of its session."""
    session = Path(f"/proc/{pid}/autogroup")
    words = session.read_text().split() if session.exists() else []
    return os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid), "".join(words[-1:])


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_IDLE])
async def test_in_the_background_it_gives_way_with_all_it_starts(
    guard: Guard, runtime: Path, background: bool, policy: int
) -> None:
    os.sched_setscheduler(guard.pid, policy, os.sched_param(0))
    nice = os.getpriority(os.PRIO_PROCESS, guard.pid)
    script = "setsid sleep 60 & sleep 60"
    child = await guard.spawn(["/bin/sh", "-c", script], dict(os.environ), "/", nothing(runtime), background=background)
    await until(lambda: len(descendants(child.pid)) == 2)
    here = (nice + 5, os.SCHED_BATCH if policy == os.SCHED_OTHER else policy) if background else (nice, policy)
    for process in [child.pid, *(p.pid for p in descendants(child.pid))]:
        assert standing(process)[:2] == here, "what somebody chose for the agent stays"
    assert standing(child.pid)[2] == (str(5 * background) if SESSIONS else "")
    await guard.kill_all()
    await child.aclose()


def test_the_session_gives_way_where_the_agent_is_not_root() -> None:
    """Nobody may read such an agent's memory: its files in /proc are root's, its children's too until they execute."""
    where = Path(tempfile.mkdtemp())
    os.chown(where, NOBODY if os.geteuid() == 0 else os.geteuid(), -1)

    async def agent(guard: Guard) -> None:
        with trio.fail_after(GONE_SECONDS):
            for _ in range(2):  # the kernel takes the second change only 100 ms after the first
                child = await guard.spawn(["/bin/sleep", "60"], {}, "/", nothing(where), background=True)
                assert standing(child.pid)[2] == ("5" if SESSIONS else "")
            assert await guard.kill_all() == []

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            keep_memory_private()
            trio.run(agent, Guard.start())
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    shutil.rmtree(where)


async def test_what_cannot_be_executed_is_an_error(guard: Guard, runtime: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await guard.spawn(["/nowhere"], {}, "/", nothing(runtime))
    assert await guard.kill_all() == []


async def test_signals_reach_it_with_their_default_meaning(guard: Guard, runtime: Path) -> None:
    child = await guard.spawn(["/bin/sleep", "60"], {}, "/", nothing(runtime))
    await guard.signal(child.pid, signal.SIGTERM)
    assert await child.wait() == -signal.SIGTERM
    await child.aclose()


async def test_a_cancelled_call_does_not_mix_up_the_next_one(guard: Guard, runtime: Path) -> None:
    with trio.move_on_after(0):
        await guard.kill_all()
    for _ in range(20):
        with trio.move_on_after(0.0005):
            await guard.kill_all()
    child = await guard.spawn(["/bin/true"], {}, "/", nothing(runtime))
    assert await child.wait() == 0
    await child.aclose()


async def test_kill_all_finds_whoever_left_session_and_parent(guard: Guard, runtime: Path) -> None:
    script = "trap '' TERM; (setsid sh -c \"trap '' TERM; sleep 60; sleep 60\" &) ; sleep 60"
    child = await guard.spawn(["/bin/sh", "-c", script], {"PATH": os.environ["PATH"]}, "/", nothing(runtime))
    await until(lambda: len(descendants(guard.pid)) >= 4)
    assert await guard.kill_all() == []
    assert descendants(guard.pid) == []
    assert await child.wait() == -signal.SIGKILL
    await child.aclose()


def test_the_guard_keeps_no_inherited_descriptor_and_no_terminal_signal() -> None:
    reader, writer = os.pipe()
    guard = Guard.start()
    os.close(writer)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guard.pid, signum)
    assert os.read(reader, 1) == b"", "the guard holds our pipe"
    assert alive(guard.pid)
    assert os.getsid(guard.pid) == guard.pid
    guard.close()
    assert not alive(guard.pid)
    os.close(reader)


@asynccontextmanager
async def doomed(role: str, runtime: Path, **env: str) -> AsyncIterator[dict[str, Any]]:
    """The pids of a running agent whose end is the test's business; nothing of it is left afterwards in any case."""
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            command = [sys.executable, str(AGENT), role, str(runtime)]
            paths = {"PYTHONPATH": f"{AGENT.parent.parent.parent}"}
            await trio.run_process(command, env={**os.environ, **paths, **env}, check=False)

        nursery.start_soon(run)
        await until((runtime / "pids").exists, 30)
        pids = json.loads((runtime / "pids").read_text())
        try:
            yield pids
        finally:
            for pid in [pids["agent"], *pids["tree"]]:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


async def killed(runtime: Path, role: str, victims: Callable[[dict[str, Any]], list[int]], **env: str) -> None:
    async with doomed(role, runtime, **HARDEST, **env) as pids:
        noted = notes(runtime)
        assert len(noted) == 1
        for pid in victims(pids):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not any(map(alive, [pids["agent"], pids["guard"], *pids["tree"]])), GONE_SECONDS)
    left = names(runtime) - {"pids"}
    assert not left, "socket, notes, and the unpacked bundle (by the bootloader, or by the guard when that was killed)"
    assert not noted & shm()


def notes(runtime: Path) -> set[str]:
    return set(json.loads((runtime / "leftovers.json").read_text())["shm"])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_nothing_is_left_whoever_is_killed(runtime: Path) -> None:
    """All at once, because the guard gives vLLM five seconds, and the fake's EngineCore takes them."""
    starting = {"FAKE_VLLM_START_SECONDS": "60", "FAKE_VLLM_START_IGNORES_TERM": "1"}
    async with trio.open_nursery() as nursery:
        for number, (role, victims, env) in enumerate(
            [
                ("agent", lambda p: [p["agent"]], {}),
                ("agent", lambda p: [p["agent"]], starting),
                ("bootloader", lambda p: [parent_of(p["agent"])], {}),
                ("bootloader", lambda p: [p["agent"]], {}),
                ("bootloader", lambda p: [parent_of(p["agent"]), p["agent"]], starting),
            ]
        ):
            place = runtime / str(number)
            place.mkdir()
            nursery.start_soon(partial(killed, place, role, victims, **env))


async def test_guard_killed(runtime: Path) -> None:
    async with doomed("lost", runtime, **HARDEST) as pids:
        await until((runtime / "orphans ended").exists)
        assert not any(map(alive, [p for p in pids["tree"] if p != pids["agent"]]))
    assert names(runtime) == {"pids", "orphans ended"}, "socket, notes, and what these named"


async def test_semaphores_are_noted_though_they_are_mapped_under_another_name(guard: Guard, runtime: Path) -> None:
    script = "import multiprocessing as m, time; l = m.get_context('spawn').Lock(); time.sleep(60)"
    child = await guard.spawn([sys.executable, "-c", script], dict(os.environ), "/", nothing(runtime))
    await until(lambda: any(name.startswith("sem.mp-") for name in notes(runtime)))
    noted = notes(runtime)
    assert noted <= shm()
    await guard.kill_all()
    assert not noted & shm()
    await child.aclose()


def test_leftovers_of_others_stay(runtime: Path) -> None:
    name = f"xim_test_{os.getpid()}"
    path = Path("/dev/shm", name)
    path.write_bytes(b"x")
    try:
        Leftovers(str(runtime / "l.json"), shm={name: (path.stat().st_dev, path.stat().st_ino + 1)}).sweep()
        assert path.exists(), "same name, another file"
        Leftovers(str(runtime / "l.json"), [str(path)]).sweep()
        assert path.exists(), "not a socket"
        kept = Leftovers(str(runtime / "l.json"), shm={name: (path.stat().st_dev, path.stat().st_ino)})
        kept.save()
        assert Leftovers.load(str(runtime / "l.json")).sweep() == [str(path)]
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
