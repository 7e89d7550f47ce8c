"""What compose/monitoring/ ships, read; and a real Prometheus on loopback that runs it."""

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio
from ruamel.yaml import YAML

PLACE = Path(__file__).parents[2] / "compose" / "monitoring"
DASHBOARD = PLACE / "grafana" / "dashboards" / "xim.json"


def read(name: str) -> Any:
    return YAML(typ="safe").load(PLACE / name)


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in read(name)["groups"] for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and expression, as Grafana sends it when all is shown."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$__rate_interval", "30s").replace("$instance", ".*")
            yield panel["title"], expr


class Prometheus:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def ask(self, path: str, **parameters: Any) -> Any:
        reply = await self._client.get(f"/api/v1/{path}", params=parameters)
        found = reply.json()
        assert found["status"] == "success", found
        return found["data"]

    async def query(self, expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.ask("query", query=expr))["result"]
        return found

    async def until(self, expr: str) -> list[dict[str, Any]]:
        """Asks until there is a result; fails after 60 s. The first scrape comes some seconds after the start."""
        with trio.fail_after(60):
            while True:
                if found := await self.query(expr):
                    return found
                await trio.sleep(0.2)


@asynccontextmanager
async def prometheus(directory: Path, port: int, targets: dict[str, str]) -> AsyncIterator[Prometheus]:
    """With the shipped configuration, but `targets` by job, everything once a second, and alerts that wait for one."""
    for name in ("recording.yml", "alerts.yml"):
        text = (PLACE / name).read_text()
        for rule in rules(name):
            if "for" in rule:
                text = text.replace(f"        for: {rule['for']}\n", "        for: 1s\n")
        (directory / name).write_text(text)
    config = read("prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"] = [one for one in config["scrape_configs"] if one["job_name"] in targets]
    for one in config["scrape_configs"]:
        one["static_configs"][0]["targets"] = [targets[one["job_name"]]]
    (directory / "prometheus.yml").write_text(json.dumps(config))  # which is YAML
    command = [
        "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=warn",
    ]  # fmt: skip
    process = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            with trio.fail_after(30):
                while True:
                    if await _ready(client):
                        break
                    await trio.sleep(0.1)
            yield Prometheus(client)
    finally:
        process.terminate()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await process.wait()


async def _ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False
