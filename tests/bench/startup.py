"""Start-up of both forms of the executable against a bare frozen trio program: `python tests/bench/startup.py`.

The bare program is frozen with the same PyInstaller and the same libraries. The two run in turns, so that a busy
machine slows both. Exit 1 when `--version` takes more than 2 times (one file) or 1.3 times (one directory) as long.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".work" / "freeze" / "venv" / "bin" / "python"
NAME = "xerotier-xim-agent"
FORMS = {"file": ("bare", NAME, 2.0), "dir": ("bare/bare", f"onedir/{NAME}", 1.3)}
BARE = """
import trio

async def main():
    await trio.lowlevel.checkpoint()

trio.run(main)
"""


def bare(form: str) -> Path:
    work = ROOT / ".work" / "bench" / form
    work.mkdir(parents=True, exist_ok=True)
    (work / "bare.py").write_text(BARE)
    places = ["--distpath=.", "--workpath=build", "--specpath=.", "--log-level=ERROR"]
    options = [f"--one{form}", "--strip", "--noconfirm", *places]
    subprocess.run([str(PYTHON), "-m", "PyInstaller", *options, "bare.py"], check=True, cwd=work)
    return work / FORMS[form][0]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def pairs(ours: list[str], base: list[str], rounds: int = 9) -> list[tuple[float, float]]:
    """Wall times; the first round, which fills the page cache, is not counted."""
    return [(seconds(ours), seconds(base)) for _ in range(rounds + 1)][1:]


def main() -> None:
    too_slow = False
    for form, (_, path, most) in FORMS.items():
        times = pairs([str(ROOT / "dist" / path), "--version"], [str(bare(form))])
        ours, base = (statistics.median(side) for side in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        too_slow |= ratio > most
        print(f"one {form}: --version {ours:.3f} s, bare trio {base:.3f} s, ratio {ratio:.2f} (at most {most})")
    sys.exit(too_slow)


if __name__ == "__main__":
    main()
