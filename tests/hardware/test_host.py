"""CPU and cgroups from recorded files."""

from pathlib import Path

import pytest

from xim_agent.hardware.host import cpu_info, limits, read_host

GIB = 2**30
X86 = "\n\n".join(
    f"processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: Xeon\nphysical id\t: {n % 2}\ncore id\t\t: {n // 4}\n"
    "flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_bf16 amx_bf16 ht"
    for n in range(8)
)
ARM = "\n\n".join(f"processor\t: {n}\nFeatures\t: fp asimd sve i8mm\nCPU implementer\t: 0x41" for n in range(4))


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_x86() -> None:
    cpu, where = cpu_info(X86)
    assert (cpu.model, cpu.cores, cpu.threads, cpu.vendor) == ("Xeon", 4, 8, "GenuineIntel")
    assert cpu.isa == ("amx_bf16", "avx", "avx2", "avx512_bf16", "avx512f", "sse4_2")
    assert where[5] == (1, 1)


def test_arm_takes_cores_from_sysfs(tmp_path: Path) -> None:
    put(tmp_path, **{"proc/cpuinfo": ARM, "proc/meminfo": "MemTotal:       1048576 kB\n"})
    for n in range(4):
        put(
            tmp_path,
            **{
                f"sys/devices/system/cpu/cpu{n}/topology/physical_package_id": "0\n",
                f"sys/devices/system/cpu/cpu{n}/topology/core_id": f"{n // 2}\n",
            },
        )
    host = read_host(tmp_path, [3, 1, 2])
    assert host.cpu.isa == ("asimd", "i8mm", "sve")
    assert (host.cpu.cores, host.cpu.threads) == (2, 4)
    assert (host.cpus, host.core_of) == ((1, 2, 3), (0, 1, 1))
    assert (host.cpu_limit, host.memory_bytes, host.shm_bytes) == (3.0, GIB, 0)


MOUNT_2 = "30 24 0:26 {base} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_1 = (
    "31 24 0:29 {base} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 24 0:30 {base} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
G2, G1C, G1M = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"
CASES: dict[str, tuple[dict[str, str], tuple[float, float]]] = {
    "v2, no limit": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": MOUNT_2.format(base="/"),
            f"{G2}/a/cpu.max": "max 100000\n",
            f"{G2}/a/memory.max": "max\n",
        },
        (float("inf"), float("inf")),
    ),
    "v2, limits of self and a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": MOUNT_2.format(base="/"),
            f"{G2}/a/cpu.max": "150000 100000\n",
            f"{G2}/a/b/cpu.max": "max 100000\n",
            f"{G2}/a/memory.max": f"{4 * GIB}\n",
            f"{G2}/a/b/memory.max": f"{8 * GIB}\n",
        },
        (1.5, 4 * GIB),
    ),
    "v2 in a container": (
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": MOUNT_2.format(base="/"),
            f"{G2}/cpu.max": "200000 100000\n",
            f"{G2}/memory.max": f"{GIB}\n",
        },
        (2.0, GIB),
    ),
    "v1 in a container without its own namespace": (
        {
            "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/docker/x\n",
            "proc/self/mountinfo": MOUNT_1.format(base="/docker/x"),
            f"{G1C}/cpu.cfs_quota_us": "50000\n",
            f"{G1C}/cpu.cfs_period_us": "100000\n",
            f"{G1M}/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
        (0.5, 2 * GIB),
    ),
    "v1, path outside the mount": (
        {
            "proc/self/cgroup": "4:memory:/elsewhere\n",
            "proc/self/mountinfo": MOUNT_1.format(base="/docker/x"),
            f"{G1M}/memory.limit_in_bytes": f"{2 * GIB}\n",
        },
        (float("inf"), 2 * GIB),
    ),
    "hybrid": (
        {
            "proc/self/cgroup": "4:memory:/s\n3:cpu,cpuacct:/\n0::/\n",
            "proc/self/mountinfo": MOUNT_1.format(base="/")
            + "33 24 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            f"{G1C}/cpu.cfs_quota_us": "-1\n",
            f"{G1C}/cpu.cfs_period_us": "100000\n",
            f"{G1M}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{G1M}/s/memory.limit_in_bytes": f"{3 * GIB}\n",
        },
        (float("inf"), 3 * GIB),
    ),
    "v2, a part of one CPU, far up": (
        {
            "proc/self/cgroup": "0::/a.slice/b.service/c\n",
            "proc/self/mountinfo": MOUNT_2.format(base="/"),
            f"{G2}/a.slice/cpu.max": "25000 100000\n",
            f"{G2}/a.slice/b.service/cpu.max": "300000 100000\n",
            f"{G2}/a.slice/b.service/c/memory.max": "max\n",
        },
        (0.25, float("inf")),
    ),
    "v2, a file that says nothing": (
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": MOUNT_2.format(base="/"),
            f"{G2}/a/cpu.max": "\n",
            f"{G2}/a/memory.max": "nonsense\n",
        },
        (float("inf"), float("inf")),
    ),
    "v1, nested": (
        {
            "proc/self/cgroup": "4:memory:/pods/p/c\n3:cpu,cpuacct:/pods/p/c\n",
            "proc/self/mountinfo": MOUNT_1.format(base="/"),
            f"{G1C}/pods/p/cpu.cfs_quota_us": "350000\n",
            f"{G1C}/pods/p/cpu.cfs_period_us": "100000\n",
            f"{G1C}/pods/p/c/cpu.cfs_quota_us": "-1\n",
            f"{G1C}/pods/p/c/cpu.cfs_period_us": "100000\n",
            f"{G1M}/pods/memory.limit_in_bytes": f"{5 * GIB}\n",
            f"{G1M}/pods/p/memory.limit_in_bytes": f"{6 * GIB}\n",
            f"{G1M}/pods/p/c/memory.limit_in_bytes": "9223372036854771712\n",
        },
        (3.5, 5 * GIB),
    ),
    "nothing to read": ({}, (float("inf"), float("inf"))),
}


@pytest.mark.parametrize("name", CASES)
def test_cgroup_limits(tmp_path: Path, name: str) -> None:
    files, expected = CASES[name]
    put(tmp_path, **files)
    assert limits(tmp_path) == expected


def test_limits_bound_the_host(tmp_path: Path) -> None:
    put(
        tmp_path,
        **{"proc/cpuinfo": X86, "proc/meminfo": "MemTotal:       2097152 kB\n"},
        **CASES["v2 in a container"][0],
    )
    host = read_host(tmp_path, range(8))
    assert (host.cpu_limit, host.memory_total_bytes, host.memory_bytes) == (2.0, 2 * GIB, GIB)
    assert host.core_of == (0, 1, 0, 1, 2, 3, 2, 3)


def test_a_cpuset_is_the_affinity_and_the_quota_may_be_less_or_more(tmp_path: Path) -> None:
    put(
        tmp_path,
        **{"proc/cpuinfo": X86, "proc/meminfo": "MemTotal:       2097152 kB\n"},
        **CASES["v1, nested"][0],
    )
    assert read_host(tmp_path, [6, 2]).cpu_limit == 2.0
    host = read_host(tmp_path, [7, 6, 5, 4])
    assert (host.cpu_limit, host.cpus) == (3.5, (4, 5, 6, 7))
