"""Enrollment and refresh over loopback by the executable; by hand: `./build/freeze && python tests/bench/identity.py`.

The times are the agent's own, from its log: key made (enrollment), proof, call, every check, state on disk; each is the
first call of its process. The peer is what nobody can do without: one HTTP call of that size to the same router, by
curl, and the same bytes written, fsynced and renamed as often. Prints medians; exit 1 above 150 and 30 ms.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXE = ROOT / "dist" / "xerotier-xim-agent"
ROUNDS = 15
TARGETS = {"enrollment": 0.150, "refresh": 0.030}


def enroll(state: Path, key: str | None) -> float:
    """Seconds that the one enrollment or refresh took."""
    own = {"XEROTIER_AGENT_CONFIG_PATH": str(state), "XEROTIER_AGENT_LOG_LEVEL": "debug", "HOME": str(state.parent)}
    env = {**os.environ, **own, "XEROTIER_AGENT_LOG_FORMAT": "json", "XEROTIER_AGENT_JOIN_KEY": key or ""}
    done = subprocess.run([str(EXE), "enroll"], env=env, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stderr.splitlines() if '"seconds"' in line]
    return float(rows[-1]["seconds"])


def curl(url: str, body: Path) -> float:
    """Seconds of one call, without curl's own start."""
    words = ["-H", "XIM-Protocol: 1", "-o", "/dev/null", "-w", "%{time_total}", "--data-binary", f"@{body}", url]
    return float(subprocess.run(["curl", "-s", *words], capture_output=True, text=True, check=True).stdout)


def durable_write(path: Path, data: bytes) -> float:
    began = time.perf_counter()
    with path.with_suffix(".new").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".new").rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ROOT / ".work") as scratch:
        root = Path(scratch)
        data = ["--data", str(root / "router")]
        listen = "127.0.0.1:18480"
        with subprocess.Popen(
            [str(EXE), "router", "serve", "--listen", listen, *data], stderr=subprocess.PIPE, text=True
        ) as router:
            assert router.stderr is not None
            while "listening" not in router.stderr.readline():
                pass
            create = [str(EXE), "router", "join-key", "create", "--project", "bench", "--uses", "999", *data]
            key = subprocess.run(create, capture_output=True, text=True, check=True).stdout.strip()
            times = measure(root, key, f"http://{listen}/v1/enroll")
            router.terminate()
    medians = {name: statistics.median(found) for name, found in times.items()}
    call, write = medians["curl, one call"], medians["one durable write"]
    floors = {"enrollment": call + 2 * write, "refresh": call + write}
    for name, seconds in medians.items():
        ratio = f", {seconds / floors[name]:.1f} x what it cannot do without" if name in floors else ""
        print(f"{name:<22} {seconds * 1000:7.1f} ms (max {max(times[name]) * 1000:.1f}){ratio}")
    sys.exit(any(medians[name] > most for name, most in TARGETS.items()))


def measure(root: Path, key: str, url: str) -> dict[str, list[float]]:
    names = ("enrollment", "refresh", "curl, one call", "one durable write")
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        state = root / f"agent{number}"
        found = [enroll(state, key), enroll(state, None)]
        content = (state / "enrollment.json").read_bytes()
        found += [curl(url, state / "enrollment.json"), durable_write(root / "copy", content)]
        if number:  # the first round fills caches
            for name, seconds in zip(names, found, strict=True):
                times[name].append(seconds)
    return times


if __name__ == "__main__":
    main()
