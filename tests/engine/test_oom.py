"""What the kernel killed for want of memory is called so. For the kernel itself see test_endings."""

from pathlib import Path

import pytest

from xim_agent.engine.failures import classify
from xim_agent.engine.oom import OomKills, Where
from xim_agent.hardware.host import oom_kills

KILLED = "ERROR 11-25 12:57:44 [x.py:1] Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down."


@pytest.mark.parametrize(
    ("status", "tail", "oom", "code"),
    [
        (-9, "", "machine", "host_out_of_memory"),
        (-9, "", "cgroup", "host_out_of_memory"),
        (1, KILLED, "machine", "host_out_of_memory"),
        (-9, "", "", "engine_killed"),
        (1, "", "cgroup", "host_out_of_memory"),
        (1, "", "machine", "engine_failed"),  # on a shared machine kills of others are no explanation
        (1, "torch.cuda.OutOfMemoryError: x", "cgroup", "gpu_out_of_memory"),
        (1, "SafetensorError: y", "cgroup", "corrupt_weights"),
    ],
)
def test_its_class(status: int, tail: str, oom: Where, code: str) -> None:
    found = classify(status, tail, oom=oom)
    assert found.code == code
    assert ("killed for want of memory" in found.text) == (code == "host_out_of_memory")
    if code == "host_out_of_memory":
        assert found.retry, "it may fit the next time"
        assert "MAX_NUM_SEQS" in found.remedy
        assert found.tail == tail


def test_only_a_kill_around_the_end_explains_it() -> None:
    counts = [(3, 7)]
    kills = OomKills(lambda: counts[-1], within=30.0)
    kills.look(0.0)
    assert kills.lately(1.0) == "", "what was before the start"
    counts.append((3, 8))
    assert kills.lately(2.0) == "machine"
    counts.append((4, 9))
    kills.look(10.0)
    assert kills.lately(40.0) == "cgroup"
    assert kills.lately(40.1) == ""


@pytest.mark.parametrize(
    ("cgroup", "mount", "file", "text"),
    [
        (
            "0::/a/b\n",
            "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw",
            "sys/fs/cgroup/a/b/memory.events",
            "low 0\nhigh 3\nmax 12\noom 5\noom_kill 4\noom_group_kill 0\n",
        ),
        (
            "4:memory:/a/b\n0::/\n",
            "30 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
            "sys/fs/cgroup/memory/a/b/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        ),
    ],
)
def test_the_kernels_counters(tmp_path: Path, cgroup: str, mount: str, file: str, text: str) -> None:
    assert oom_kills(tmp_path) == (0, 0), "where nothing is told"
    for name, content in {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mount + "\n",
        "proc/vmstat": "nr_free_pages 1\noom_kill 9\n",
        file: text,
        str(Path(file).parent.parent / Path(file).name): text.replace("oom_kill 4", "oom_kill 6"),  # of others
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert oom_kills(tmp_path) == (4, 9)
