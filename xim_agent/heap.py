"""The garbage collector of a process that serves for months: seldom, and never all at once."""

import gc

YOUNG = 20_000  # net new objects, some 2 MB, until the youngest are looked at
YOUNGER, OLDER = 10, 10  # looks at one generation until the next older one is looked at, too


def settle_heap() -> None:
    """To be called once everything is loaded. What is garbage without a cycle is freed at once as ever.

    CPython's default looks at the youngest after 700 objects, and each look at the whole heap stops everything: 0.2 to
    0.6 s every ten seconds in a router of 1,000 agents, whose polls outlive two generations. Modules and code, which
    live as long as the process, are never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, YOUNGER, OLDER)
