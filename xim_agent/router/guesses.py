"""Secrets cannot be guessed: an address that presents unknown ones is soon not listened to (wire-protocol §3.2)."""

import ipaddress
from collections import OrderedDict

from xim_agent.router.tokens import Problem

ALLOWED = 10  # unknown ones in a row from one address: mistakes of people stay below
REFILL_SECONDS = 6.0  # one more for each that passes
KEEP = 4096  # addresses


class Guesses:
    """Of one kind of secret (`what`, in the plural). `now` is monotonic seconds.

    Counts per address; a /64 is one, who has an IPv6 address has that many.

    In memory and bounded: the address least lately wrong is forgotten first, when it has most likely been forgiven.
    """

    def __init__(self, what: str = "join keys") -> None:
        self._what = what
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when all ALLOWED are there again

    def check(self, address: str, now: float) -> None:
        """Raises Problem 429 `rate_limited` while an address has none left, whatever it brings."""
        wait = self._full_at.get(_network(address), now) - now - (ALLOWED - 1) * REFILL_SECONDS
        if wait > 0:
            detail = f"too many unknown {self._what} came from this address"
            raise Problem(429, "rate_limited", detail, retry_after=wait)

    def wrong(self, address: str, now: float) -> None:
        """An unknown one came from there."""
        network = _network(address)
        self._full_at[network] = max(self._full_at.get(network, now), now) + REFILL_SECONDS
        self._full_at.move_to_end(network)
        while len(self._full_at) > KEEP:
            self._full_at.popitem(last=False)


def _network(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return address
