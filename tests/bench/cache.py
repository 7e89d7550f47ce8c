"""The cache against shell pipelines, the hub's downloader and a slow link; by hand: `python tests/bench/cache.py`.

All rows fetch the same bf16 model from the same server, which sends files without touching them (origin.py: the local
router spends as much CPU as the agent, and here both share the cores). Every run is in a process of its own, rounds are
interleaved. MB: 10^6 bytes of model. CPU and peak memory: of the process and its children, without the server's.
Ratios are of medians; `--gib 16 --rounds 1 --only cache` shows that memory does not grow with the model.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GIGABIT = 1_000_000_000 / 8
CORES = len(os.sched_getaffinity(0))

# $U: URL of the files; $M: the lists of digests; the working directory is empty.
SHELL = """
set -e -o pipefail
while read -r digest chunk; do
    curl -sf -o "$chunk" "$U/chunks/$chunk"
    echo "$digest  $chunk" | sha256sum -c --status
    zstd -dqc "$chunk" >> "${chunk%.*.zst}"
    sync "$chunk" "${chunk%.*.zst}"
done < "$M/chunks.sha"
sha256sum -c --status "$M/model.sha"
"""
PIPED = """
set -e -o pipefail
while read -r digest packed; do
    file=${packed%.zst}
    mkfifo a b
    sha256sum < a > "$packed.sha" & sha256sum < b > "$file.sha" &
    curl -sf "$U/zst/$packed" | tee a "$packed" | zstd -dqc | tee b > "$file"
    wait; rm a b
    sync "$packed" "$file"
    read -r found _ < "$packed.sha"; [ "$found" = "$digest" ]
    read -r found _ < "$file.sha"; grep -q "^$found  $file" "$M/model.sha"
done < "$M/zst.sha"
"""
UNVERIFIED = """
set -e -o pipefail
while read -r _ packed; do curl -sf "$U/zst/$packed" | zstd -dqc > "${packed%.zst}"; done < "$M/zst.sha"
"""
RAW = """
set -e
while read -r _ file; do curl -sf -o "$file" "$U/model/$file"; sync "$file"; done < "$M/model.sha"
sha256sum -c --status "$M/model.sha"
"""
UNPACK = 'ls "$M/files/zst" | xargs -P "$CORES" -I {} sh -c \'zstd -dqf "$M/files/zst/{}" -o "$(basename {} .zst)"\''
PREPARE = """
set -e
cd "$M/files/model"; sha256sum * > "$M/model.sha"
for f in *; do
    zstd -1 -q -T0 "$f" -o "../zst/$f.zst"
    split -b 16M -d -a 5 --filter='zstd -1 -q > $FILE.zst' "$f" "../chunks/$f."
done
cd ../zst; sha256sum * > "$M/zst.sha"; cd ../chunks; sha256sum * > "$M/chunks.sha"
"""
HUB = "from huggingface_hub import snapshot_download as s; s('bench/model', cache_dir='.', max_workers=8)"


@dataclass
class Run:
    seconds: float
    cpu: float
    rss: int


class Bench:
    def __init__(self, root: Path, gib: float) -> None:
        self.root, self.size = root, int(gib * 1024) * 1024 * 1024
        self.work, self.cache, self.data = root / "work", root / "cache", root / "data"
        self.url = self.slow = ""
        self.env = {
            "PATH": os.environ["PATH"],
            "M": str(root),
            "CORES": str(CORES),
            "HOME": str(root),
            "PYTHONPATH": str(ROOT),
        }

    def prepare(self) -> None:
        for name in ("zst", "chunks"):
            (self.root / "files" / name).mkdir(parents=True)
        words = ["make", self.root / "files/model", self.data, self.size, 3]
        done = subprocess.run(
            [sys.executable, HERE / "once.py", *map(str, words)], env=self.env, stdout=subprocess.PIPE, check=True
        )
        (self.root / "reference.json").write_bytes(done.stdout)
        self.size = json.loads(done.stdout)[4]

    @contextlib.contextmanager
    def server(self, rate: float) -> Iterator[str]:
        words = [sys.executable, HERE / "origin.py", self.data, self.root / "files", rate]
        with subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
            finally:
                process.terminate()

    def shell(self, script: str, url: str = "") -> Run:
        return self._run(["bash", "-c", script], {"U": f"{url or self.url}/files"})

    def hub(self) -> Run:
        own = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return self._run([str(self.root / "venv/bin/python"), "-c", HUB], own)

    def fetch(self, bound: int = 10**13, url: str = "") -> Run:
        shutil.rmtree(self.cache, ignore_errors=True)
        return self._agent(url or self.url, bound)

    def switch_back(self) -> Run:
        """After `fetch`, which left the chunks in the store."""
        for path in (self.cache / "ready").iterdir():
            shutil.rmtree(path)
        return self._agent("-", 10**13)

    def _agent(self, url: str, bound: int) -> Run:
        words = [sys.executable, HERE / "once.py", self.root / "reference.json", url, self.cache, bound]
        return self._run([*map(str, words)], {})

    def _run(self, words: list[str], own: dict[str, str]) -> Run:
        """What an agent's run prints counts for its time and memory, since it starts once for many models."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        os.sync()
        began = time.perf_counter()
        with subprocess.Popen(words, env=self.env | own, cwd=self.work, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{words[:3]} ended with {process.returncode}: {output}")
        own_figures = json.loads(output) if "once.py" in " ".join(words) else {}
        return Run(
            own_figures.get("seconds", seconds),
            usage.ru_utime + usage.ru_stime,
            own_figures.get("rss", usage.ru_maxrss * 1024),
        )


def rows(bench: Bench, wanted: list[str]) -> dict[str, tuple[str, Callable[[], Run]]]:
    """Name: (the row it is compared with, how it is run), in the order of a round."""
    tight = int(bench.size * 1.15)  # too little for files and chunks
    every = {
        "cache, stored too": ("shell, by chunk", bench.fetch),
        "switch back": ("zstd -d, all cores", bench.switch_back),
        "cache, streamed through": ("shell, by chunk", lambda: bench.fetch(tight)),
        "shell, by chunk": ("", lambda: bench.shell(SHELL)),
        "shell, by file, piped": ("shell, by chunk", lambda: bench.shell(PIPED)),
        "curl | zstd -d": ("shell, by chunk", lambda: bench.shell(UNVERIFIED)),
        "hub's downloader": ("shell, by chunk", bench.hub),
        "zstd -d, all cores": ("", lambda: bench.shell(UNPACK)),
        "zstd -d, all cores, sync": ("zstd -d, all cores", lambda: bench.shell(UNPACK + "; sync *")),
        "1 Gbit/s: cache": ("1 Gbit/s: raw", lambda: bench.fetch(url=bench.slow)),
        "1 Gbit/s: raw": ("", lambda: bench.shell(RAW, bench.slow)),
    }
    return {name: row for name, row in every.items() if any(name.startswith(w) for w in wanted)}


def show(bench: Bench, found: dict[str, list[Run]], against: dict[str, str]) -> None:
    stored = sum(p.stat().st_size for p in (bench.data / "models/blobs").rglob("*") if p.is_file())
    print(f"{bench.size / 2**30:.1f} GiB, {CORES} cores; stored {stored / bench.size:.3f} of the files", flush=True)
    print(f"{'':<26} {'MB/s':>6} {'(min':>6} {'max)':>6} {'CPU s':>6} {'MiB':>5} ratio")
    medians = {name: statistics.median(r.seconds for r in runs) for name, runs in found.items()}
    for name, runs in found.items():
        rates = sorted(bench.size / 1e6 / r.seconds for r in runs)
        ratio = f"{medians[against[name]] / medians[name]:.2f} x {against[name]}" if against[name] in medians else ""
        cpu, rss = statistics.median(r.cpu for r in runs), max(r.rss for r in runs) >> 20
        rate = bench.size / 1e6 / medians[name]
        print(f"{name:<26} {rate:6.0f} {rates[0]:6.0f} {rates[-1]:6.0f} {cpu:6.1f} {rss:5} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="rows whose names begin so")
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / ".work",
        help="where 6 times the model fits, 3 times for the cache alone",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-") as scratch:
        bench = Bench(Path(scratch), options.gib)
        bench.prepare()
        chosen = rows(bench, options.only or [""])
        if chosen.keys() <= {"cache, stored too", "cache, streamed through", "switch back"}:
            shutil.rmtree(bench.root / "files/model")  # of 16 GiB, one copy less
        else:
            subprocess.run(["bash", "-c", PREPARE], env=bench.env, check=True)
        if "hub's downloader" in chosen:
            subprocess.run([sys.executable, "-m", "venv", str(bench.root / "venv")], check=True)
            pip = [str(bench.root / "venv/bin/pip"), "install", "-q", "huggingface_hub"]
            subprocess.run(pip, check=True)
        found: dict[str, list[Run]] = {name: [] for name in chosen}
        with bench.server(0) as bench.url, bench.server(GIGABIT) as bench.slow:
            for number in range(options.rounds):
                for name, (_, run) in chosen.items():
                    if number == 0 or not name.startswith("1 Gbit"):  # the link decides there: once is enough
                        found[name].append(run())
                        print(f"{name}: {bench.size / 1e6 / found[name][-1].seconds:.0f} MB/s", file=sys.stderr)
        show(bench, found, {name: other for name, (other, _) in chosen.items()})


if __name__ == "__main__":
    main()
