"""Start-up time of the executable against a bare frozen trio program; run by hand: `python tests/bench/startup.py`.

The bare program is frozen with the same PyInstaller and the same libraries. Exit 1 when the ratio is above 2.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".work" / "freeze" / "venv" / "bin" / "python"
BARE = """
import trio

async def main():
    await trio.lowlevel.checkpoint()

trio.run(main)
"""


def bare() -> Path:
    work = ROOT / ".work" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    (work / "bare.py").write_text(BARE)
    places = ["--distpath=.", "--workpath=build", "--specpath=.", "--log-level=ERROR"]
    options = ["--onefile", "--strip", "--noconfirm", *places]
    subprocess.run([str(PYTHON), "-m", "PyInstaller", *options, "bare.py"], check=True, cwd=work)
    return work / "bare"


def seconds(command: list[str], rounds: int = 15) -> float:
    """Median wall time; the first run, which fills the page cache, is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    agent, plain = ROOT / "dist" / "xerotier-xim-agent", bare()
    ours, base = seconds([str(agent), "--version"]), seconds([str(plain)])
    size = agent.stat().st_size / 1e6
    print(f"agent --version {ours:.3f} s ({size:.1f} MB), bare trio {base:.3f} s, ratio {ours / base:.2f}")
    sys.exit(ours / base > 2)


if __name__ == "__main__":
    main()
