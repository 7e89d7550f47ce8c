"""What others can see of a process that holds secrets: not these.

Removing a variable from the environment changes what children inherit, not these: the kernel shows the memory in which
the process got its arguments and variables, for as long as it lives. That memory is overwritten here: of our own
process before the guard is forked from it, and, where the kernel allows it, of the bootloader of a one-file program.
"""

import os
import resource
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from xim_agent.engine.guard import bundle
from xim_agent.prctl import keep_memory_private

_HIDDEN = b"*"


def keep_private(variables: Collection[str] = (), flags: Collection[str] = ()) -> None:
    """Also, no core is dumped, and only root may trace the process. Call it before the first fork.

    `variables` and `flags` (with their dashes) are those whose values are secret. Never fails: for them it is a second
    line of defence, behind …_FILE and systemd's credentials.
    """
    names, words = [name.encode() for name in variables], [flag.encode() for flag in flags]
    _scrub(os.getpid(), names, words)
    with suppress(OSError):
        bootloader = os.getppid()
        if bundle() is not None and Path(f"/proc/{bootloader}/exe").samefile("/proc/self/exe"):
            _scrub(bootloader, names, words)
            # It dies of the signal that its program died of.
            resource.prlimit(bootloader, resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    keep_memory_private()


def _scrub(pid: int, variables: list[bytes], flags: list[bytes]) -> None:
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        arguments, environment = map(int, fields[45:47]), map(int, fields[47:49])  # proc(5): 48 to 51, counted from 3
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for (start, end), mask in ((arguments, _arguments(flags)), (environment, _variables(variables))):
                memory.seek(start)
                old = memory.read(end - start)
                new = b"\0".join(mask(old.split(b"\0")))
                if new != old:
                    memory.seek(start)
                    memory.write(new)


def _masked(entry: bytes) -> bytes:
    """NAME=VALUE of the same length without the value."""
    name, equals, value = entry.partition(b"=")
    return name + equals + _HIDDEN * len(value)


def _variables(names: list[bytes]) -> Callable[[list[bytes]], list[bytes]]:
    return lambda entries: [_masked(e) if e.partition(b"=")[0] in names else e for e in entries]


def _arguments(flags: list[bytes]) -> Callable[[list[bytes]], list[bytes]]:
    def mask(words: list[bytes]) -> list[bytes]:
        shown = []
        for before, word in zip([b"", *words], words, strict=False):
            if before in flags:
                shown.append(_HIDDEN * len(word))
            else:
                shown.append(_masked(word) if word.partition(b"=")[0] in flags else word)
        return shown

    return mask
