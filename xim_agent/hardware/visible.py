"""Which GPUs the variables of CUDA, HIP and ROCm leave visible to vLLM, in its order. Pure."""

from collections.abc import Mapping

from xim_agent.hardware.report import Accelerator, Device

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
