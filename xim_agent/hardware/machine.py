"""The hardware as it was found, and found again while what the engine needs of it cannot be used."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import trio

from xim_agent.config.fields import Config
from xim_agent.hardware.drivers import Drivers
from xim_agent.hardware.probe import probe
from xim_agent.hardware.report import Broken, Device, Hardware
from xim_agent.hardware.visible import usable


class Machine:
    """`again`: a new look at all of it, seconds at most.

    A machine that was found without any GPU stays a CPU machine, and one whose engine has its GPUs keeps the view it
    has of them, until the agent is started again: an engine that runs is not moved to other devices.
    """

    def __init__(
        self,
        hardware: Hardware,
        config: Config,
        again: Callable[[], Awaitable[Hardware]],
        drivers: Drivers | None = None,
    ) -> None:
        self.hardware, self.drivers = hardware, drivers or Drivers()
        self._config, self._again = config, again
        self._usable = trio.Event()
        self._judge()

    @classmethod
    async def find(cls, config: Config, env: Mapping[str, str]) -> "Machine":
        """This one, as far as vLLM will see it with `env`. Raises OSError as `probe` does."""
        drivers = Drivers(env)
        again = partial(probe, env=env, drivers=drivers)
        return cls(await again(), config, again, drivers)

    @property
    def waits(self) -> bool:
        """GPUs that are there are broken, and the engine has too few without them."""
        return not self._usable.is_set()

    @property
    def broken(self) -> tuple[Broken, ...]:
        """As far as they might have been the engine's."""
        return self._chosen()[1]

    @property
    def used(self) -> tuple[Device, ...]:
        """The engine's: the first visible ones, as many as it is spread over."""
        return self._chosen()[0][: self._ranks]

    async def usable(self) -> Hardware:
        """Returns when the engine can be planned on it."""
        await self._usable.wait()
        return self.hardware

    async def look_again(self) -> None:
        """Raises OSError as `again` does."""
        found = await self._again()
        if found.accelerator == "cpu":  # gone altogether: no reason to serve from the CPU what is a GPU machine
            return
        self.hardware = found
        self._judge()

    @property
    def _ranks(self) -> int:
        return self._config.tensor_parallel_size * self._config.pipeline_parallel_size

    def _chosen(self) -> tuple[tuple[Device, ...], tuple[Broken, ...]]:
        own = self._config.cuda_visible_devices
        environ = {} if own is None else {"CUDA_VISIBLE_DEVICES": own}
        devices, broken, _ = usable(self.hardware.devices, self.hardware.broken, "nvidia", environ)
        return devices, broken

    def _judge(self) -> None:
        needed = 1 if self._config.distributed_backend == "ray" else self._ranks
        devices, broken = self._chosen()
        if self.hardware.accelerator == "cpu" or not broken or len(devices) >= needed:
            self._usable.set()
