"""Which GPUs the variables of CUDA, HIP and ROCm leave visible to vLLM, in its order. Pure."""

from collections.abc import Mapping
from itertools import takewhile

from xim_agent.hardware.report import Accelerator, Broken, Device

# Later ones choose among what earlier ones left. HIP reads CUDA's variable where its own is not set.
_VARIABLES: dict[Accelerator, tuple[tuple[str, ...], ...]] = {
    "nvidia": (("CUDA_VISIBLE_DEVICES",),),
    "amd": (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")),
    "cpu": (),
}


def visible(
    devices: tuple[Device, ...], accelerator: Accelerator, environ: Mapping[str, str]
) -> tuple[tuple[Device, ...], str]:
    """The devices left, and a note when the variables hide all of them.

    NVIDIA_VISIBLE_DEVICES speaks to the container's runtime: what it hides, the driver does not show in there either.
    """
    left, set_to = devices, []
    for names in _VARIABLES[accelerator]:
        name = next((name for name in names if name in environ), None)
        if name is not None:
            left = _chosen(left, environ[name], by_position=accelerator == "amd")
            set_to.append(f"{name}={environ[name]}")
    hidden = devices and not left
    return left, f"{' '.join(set_to)} hides all {len(devices)} GPUs of this machine" if hidden else ""


def usable(
    devices: tuple[Device, ...], broken: tuple[Broken, ...], accelerator: Accelerator, environ: Mapping[str, str]
) -> tuple[tuple[Device, ...], tuple[Broken, ...], str]:
    """`visible`, where some that the variables may choose are broken; the broken ones of the choice, and the note.

    Of an explicit choice those up to the first broken one: what CUDA makes of the others is not known.
    """
    stand_ins = {Device(one.index, one.uuid, "", 0, 0): one for one in broken if one.index >= 0}
    every = tuple(sorted((*devices, *stand_ins), key=lambda device: device.index))
    left, note = visible(every, accelerator, environ)
    if blinded(accelerator, environ):
        return (), (), note
    whole_driver = tuple(one for one in broken if one.index < 0)
    if broken and not left:  # the uuid of one that does not answer is not known
        return (), broken, ""
    chosen = any(name in environ for names in _VARIABLES[accelerator] for name in names)
    good = takewhile(lambda d: d not in stand_ins, left) if chosen else (d for d in left if d not in stand_ins)
    return tuple(good), (*whole_driver, *(stand_ins[d] for d in left if d in stand_ins)), note


def blinded(accelerator: Accelerator, environ: Mapping[str, str]) -> bool:
    """Whether a variable can name no GPU at all (-1, none, nothing): its way to ask for the CPU."""
    return any(name in environ and names_none(environ[name]) for names in _VARIABLES[accelerator] for name in names)


def names_none(selection: str) -> bool:
    first = selection.partition(",")[0].strip()
    return not first.isdecimal() and not first.lower().startswith(("gpu-", "mig-"))


def _chosen(devices: tuple[Device, ...], selection: str, *, by_position: bool) -> tuple[Device, ...]:
    """As CUDA and HIP read it: numbers or uuid prefixes, up to the first that does not exist or is there twice.

    `by_position`: a number counts what an earlier variable left; else it is the card's own, whose MIG slices only
    uuids tell apart (CUDA takes the first).
    """
    chosen: list[Device] = []
    for word in (part.strip() for part in selection.split(",")):
        found = [
            device
            for place, device in enumerate(devices)
            if (
                device.uuid.lower().startswith(word.lower())
                if len(word) > 4
                else word == str(place if by_position else device.index)
            )
        ]
        if not found or found[0] in chosen:
            break
        chosen.append(found[0])
    return tuple(chosen)
