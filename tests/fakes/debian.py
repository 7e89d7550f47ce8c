"""Root file systems of a Debian, for tests that install, boot or run something in one."""

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / ".work" / "roots"


def archive(*include: str, suite: str = "bookworm", variant: str = "minbase") -> Path:
    """A tar of a root with these packages; made once (about 17 s) and kept in .work/roots for later runs.

    Needs root, mmdebstrap and a mirror of Debian's packages (the one of this machine's own sources).
    """
    PLACE.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(" ".join([suite, variant, *sorted(include)]).encode()).hexdigest()[:16]
    tar = PLACE / f"{suite}-{key}.tar"
    with (PLACE / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tar.exists():
            assert shutil.which("mmdebstrap"), "apt install mmdebstrap debian-archive-keyring; build/test --full does"
            part = tar.with_suffix(".part.tar")
            wanted = [f"--include={','.join(sorted(include))}"] if include else []
            command = ["mmdebstrap", f"--variant={variant}", *wanted, suite, str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            part.rename(tar)
    return tar


def unpack(tar: Path, directory: Path) -> Path:
    """A fresh root in `directory`, with all owners, modes and extended attributes; 0.4 s."""
    directory.mkdir(parents=True)
    subprocess.run(["tar", "-C", str(directory), "--numeric-owner", "-xpf", str(tar)], check=True)
    return directory
