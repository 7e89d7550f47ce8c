"""The collector of a serving process: seldom at work, and what it is there for is still done."""

import subprocess
import sys

CHILD = """
import gc, weakref
from xim_agent.heap import settle_heap

class Node: pass

def cycle():
    one = Node()
    one.itself = one
    return weakref.ref(one)

settle_heap()
looks = [0, 0, 0]

def look(phase, info):
    looks[info["generation"]] += phase == "stop"

gc.callbacks.append(look)
kept = [[] for _ in range(300_000)]  # what 1,000 agents with held polls are made of
held = list(looks)
refs = [cycle() for _ in range(50_000)]
print(held, sum(ref() is None for ref in refs) > 25_000, gc.get_freeze_count() > 1000)
"""


def test_the_whole_heap_is_not_looked_at_and_cycles_still_go() -> None:
    out = subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True).stdout
    looks, cycles, frozen = out.replace("] ", "]|").replace("True ", "True|").strip().split("|")
    assert int(looks.strip("[]").split(",")[2]) == 0
    assert (cycles, frozen) == ("True", "True")
