"""What NVIDIA's Xid error numbers mean for us, after NVIDIA's catalogue of them. Pure."""

from dataclasses import dataclass

_RESET = "end what uses it and reset it (nvidia-smi --gpu-reset -i BUS), else restart the machine"
_AGAIN = (
    "nothing if it happened once (the engine is started again); if it comes back, test the card with dcgmi diag -r 3"
)
_SEAT = "restart the machine; if it comes back: power, cooling, seat and cable of the card, then replace it"


@dataclass(frozen=True)
class Xid:
    """`cure` is one line for the operator."""

    meaning: str
    cure: str


_MEANINGS = (
    ((13, 31, 32, 43, 68, 69, 109, 137), "a program on it failed", _AGAIN),
    ((48, 94), "an uncorrectable memory error", _AGAIN),
    ((64, 140), "its memory has errors that cannot be repaired while it runs", _RESET),
    ((95,), "an uncontained memory error", _RESET),
    ((62, 119, 120, 122, 123, 143), "its own processor or firmware has stopped", _RESET),
    ((74, 145, 149), "an error of NVLink", "check the bridge or NVSwitch (nvidia-smi nvlink -e); " + _RESET),
    ((79,), "it has fallen off the bus", _SEAT),
    ((54,), "its power cable is missing", _SEAT),
    ((110, 154), "the driver asks for it to be recovered", _RESET),
)
_BY_NUMBER = {number: Xid(meaning, cure) for numbers, meaning, cure in _MEANINGS for number in numbers}
# Told for the record: a cleanup after an earlier one or after a killed program, remapped rows, corrected errors.
_HARMLESS = frozenset({8, 44, 45, 63, 92})


def harmless(number: int) -> bool:
    return number in _HARMLESS


def xid(number: int) -> Xid:
    """One that is not known is shown by its number, with the place to look it up."""
    unknown = Xid("an error of the driver or the card", f"look up Xid {number} at docs.nvidia.com/deploy/xid-errors")
    return _BY_NUMBER.get(number, unknown)
