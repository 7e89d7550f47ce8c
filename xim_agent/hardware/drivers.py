"""Calls of GPU drivers and of their tools, any of which may hang on a broken card: each has a limit."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from xim_agent.hardware.nvidia import Nvidia, read_nvidia, unanswered

# Opening NVML takes 1 to 2 s a card without persistence mode; amd-smi takes 1 to 3 s on eight GPUs.
NVML_SECONDS, TOOL_SECONDS = 30.0, 20.0


class Drivers:
    """One call of a kind at a time: what hangs in the kernel cannot be ended, but nothing is started beside it.

    `env`: of the tools; some hide GPUs.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.env = env
        self._nvml = trio.CapacityLimiter(1)
        self._stuck: trio.Process | None = None

    async def nvidia(self, on_bus: Sequence[str], nvml: Any = None) -> Nvidia:
        """See `read_nvidia`. Cancelled: the call is left to its thread."""
        with trio.move_on_after(NVML_SECONDS):
            return await trio.to_thread.run_sync(read_nvidia, nvml, on_bus, abandon_on_cancel=True, limiter=self._nvml)
        return unanswered(NVML_SECONDS)

    def has(self, tool: str) -> str | None:
        """Its path; None where it is not installed."""
        path = (os.environ if self.env is None else self.env).get("PATH", os.defpath)
        return shutil.which(tool, path=path + ":/opt/rocm/bin")

    async def output(self, command: Sequence[str]) -> bytes:
        """Standard output of a tool. Raises OSError when it is missing, fails, or (TimeoutError) hangs.

        Cancelled: the tool is killed, and left behind should the kernel keep it.
        """
        path = self.has(command[0])
        if path is None:
            raise FileNotFoundError(f"{command[0]} is not installed")
        if self._stuck is not None and self._stuck.poll() is None:
            raise TimeoutError(f"{command[0]} is not asked: process {self._stuck.pid} still hangs in the driver")
        process = self._stuck = await trio.lowlevel.open_process(
            [path, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.env
        )
        try:
            with trio.move_on_after(TOOL_SECONDS):
                assert process.stdout is not None
                data = b"".join([chunk async for chunk in process.stdout])
                if (status := await process.wait()) != 0:
                    raise OSError(f"{command[0]} ended with status {status}")
                return data
            raise TimeoutError(f"{command[0]} said nothing for {TOOL_SECONDS:.0f} s")
        finally:
            if process.returncode is None:
                process.kill()
            with trio.move_on_after(1.0, shield=True):
                await process.wait()
            with trio.move_on_after(1.0, shield=True):
                assert process.stdout is not None
                await process.stdout.aclose()
