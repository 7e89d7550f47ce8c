"""What Linux lets a process decide about itself: who may look into it, and whom its end concerns (prctl(2))."""

import ctypes

PDEATHSIG, DUMPABLE, CHILD_SUBREAPER = 1, 4, 36
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def prctl(option: int, value: int) -> None:
    """Raises OSError."""
    if _prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def keep_memory_private() -> None:
    """No core dump of this process, and only root may trace it: tokens and private keys are in its memory.

    Inherited by a fork, not by what is executed: vLLM's dumps stay the operator's affair.
    """
    prctl(DUMPABLE, 0)
