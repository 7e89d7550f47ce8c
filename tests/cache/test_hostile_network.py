"""A router that lies, over real sockets and with the agent's own client: the model whole, or a refusal by name."""

import random
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard
from fakes.hostile import Asked, Liar, Lie, cache_of
from fakes.models import blob_of

from xim_agent.cache import transfer
from xim_agent.cache.service import Cache
from xim_agent.clock import SystemClock
from xim_agent.errors import AgentError, Exit
from xim_agent.mesh import blob, failures, transport
from xim_agent.mesh.client import RouterClient
from xim_agent.mesh.messages import ModelRef, Progress

Name = Callable[[str], str]
SIZE = 300_000


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    (root / "model.safetensors").write_bytes(random.Random(7).randbytes(SIZE))
    for name in "xyz":  # behind it
        (root / f"{name}.txt").write_bytes(name.encode() * 3)
    return root


@dataclass
class Bearer:
    router: str
    token: str = "secret"


@dataclass
class Credentials:
    router: str
    refusals: int = 0

    async def wait_bearer(self) -> Bearer:
        return Bearer(self.router)

    async def refused(self, token: str) -> None:
        self.refusals += 1


@dataclass
class World:
    liar: Liar
    cache: Cache
    client: RouterClient
    model: ModelRef
    victim: str
    check: Callable[[Path], None]
    stored: int
    error: AgentError | None = None

    async def get(self, report: Callable[[Progress], None] = lambda p: None) -> str | None:
        """The code of the refusal, None when the model is here; then it is whole, otherwise nothing of it is ready."""
        try:
            path = await self.cache.ensure(self.model, report)
        except AgentError as e:
            self.error = e
        else:
            self.check(path)
            return None
        assert self.error.message
        assert self.error.exit_code != Exit.BUG
        assert not list((self.cache.store.root / "ready").glob("*/*"))
        return self.error.code


@pytest.fixture
async def world(
    published: Any, model: ModelRef, model_files: Path, same_tree: Any, tmp_path: Path, nursery: trio.Nursery
) -> AsyncIterator[World]:
    liar = Liar(published[0])
    await liar.serve(nursery)
    victim = blob_of(published, "model.safetensors")
    async with RouterClient(insecure=False, clock=SystemClock(), on_skew=lambda s: None) as client:
        client.credentials = Credentials(liar.url)
        cache = cache_of(tmp_path / "cache", client, downloads=2)
        async with cache:
            stored = (published[0] / "models/blobs" / victim[:2] / victim).stat().st_size
            yield World(liar, cache, client, model, victim, lambda path: same_tree(path, model_files), stored)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called: whoever is silent is given up after a quarter of a second instead of half a minute."""

    def call() -> None:
        monkeypatch.setattr(transfer, "STALL", 0.25)
        monkeypatch.setattr(blob, "SILENCE_SECONDS", 0.25)
        monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.25)
        monkeypatch.setattr(failures, "CONNECT_SECONDS", 0.25)

    return call


# -- lies ------------------------------------------------------------------------------------------------------------


async def nothing(a: Asked) -> None:
    """Closes."""


async def reset_at_once(a: Asked) -> None:
    a.reset()


async def only_head(a: Asked) -> None:
    await a.reply(200, b"", content_length=len(a.data))


async def silent(a: Asked) -> None:
    await trio.sleep_forever()


async def silent_after_head(a: Asked) -> None:
    await only_head(a)
    await trio.sleep_forever()


async def silent_in_body(a: Asked) -> None:
    await a.reply(200, a.data[:1000], content_length=len(a.data))
    await trio.sleep_forever()


async def cut_at_99_percent(a: Asked) -> None:
    await a.reply(200, a.data[: len(a.data) * 99 // 100], content_length=len(a.data))


async def reset_in_body(a: Asked) -> None:
    await a.reply(200, a.data[: len(a.data) * 99 // 100], content_length=len(a.data))
    a.reset()


async def no_length_cut(a: Asked) -> None:
    await a.send(b"HTTP/1.0 200 OK\r\n\r\n", a.data[:100_000])


async def no_length(a: Asked) -> None:
    await a.send(b"HTTP/1.0 200 OK\r\n\r\n", a.data)


def long_head(step: bytes, first: bytes = b"", seconds: float = 0.001) -> Lie:
    async def lie(a: Asked) -> None:
        await a.send(first)
        while True:
            await a.send(step)
            await trio.sleep(seconds)

    return lie


def says(head: str, body: bytes | None = None) -> Lie:
    """This head, `{n}` the right length, and this body or the right one."""

    async def lie(a: Asked) -> None:
        text = head.format(n=len(a.data), more=len(a.data) + 10, less=len(a.data) - 10)
        await a.send(text.replace("\n", "\r\n").encode() + b"\r\n\r\n", a.data if body is None else body)

    return lie


async def more_than_it_says(a: Asked) -> None:
    await a.reply(200, a.data + b"HTTP/1.1 200 OK\r\n", content_length=len(a.data))


async def chunked_for_ever(a: Asked) -> None:
    await a.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        await a.send(b"10000\r\n", bytes(0x10000), b"\r\n")


async def for_ever(a: Asked) -> None:
    await a.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await a.send(bytes(0x10000))


async def error_for_ever(a: Asked) -> None:
    await a.send(b"HTTP/1.1 500 Oh\r\n\r\n")
    while True:
        await a.send(b"x" * 0x10000)


async def other_bytes(a: Asked) -> None:
    await a.reply(200, a.data[:-1] + bytes([a.data[-1] ^ 1]))


async def around(a: Asked) -> None:
    await a.reply(302, b"", location=f"/v1/models/blobs/{a.digest}")


def redirect(location: str) -> Lie:
    async def lie(a: Asked) -> None:
        await a.reply(307, b"", location=location)

    return lie


ZSTD = zstandard.ZstdCompressor().compress(bytes(10**8))
RIGHT = "HTTP/1.1 200 OK\ncontent-length: {n}"
CHUNKED = "HTTP/1.1 200 OK\ntransfer-encoding: chunked"
# What happens once costs one more request, and nothing else.
LIES: dict[str, Lie] = {
    "closes": nothing,
    "resets": reset_at_once,
    "closes after the head": only_head,
    "is silent": silent,
    "is silent after the head": silent_after_head,
    "is silent in the body": silent_in_body,
    "HTTP/1.0, cut": no_length_cut,
    "no HTTP": says("Hello"),
    "SSH": says("SSH-2.0-OpenSSH_9.2"),
    "1xx for ever": long_head(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a header for ever": long_head(b"x", b"HTTP/1.1 200 OK\r\nx: "),
    "headers for ever": long_head(b"a: b\r\n", b"HTTP/1.1 200 OK\r\n"),
    "huge headers": says(RIGHT + "\nx: " + "x" * 1_000_000),
    "a length and a bit": says("HTTP/1.1 200 OK\ncontent-length: {more}"),
    "a length too small": says("HTTP/1.1 200 OK\ncontent-length: {less}"),
    "two lengths": says(RIGHT + "\ncontent-length: {less}"),
    "a length below zero": says("HTTP/1.1 200 OK\ncontent-length: -1"),
    "a length beyond counting": says("HTTP/1.1 200 OK\ncontent-length: " + "9" * 5000),
    "no chunks": says(CHUNKED),
    "a chunk of a strange size": says(CHUNKED, b"zz\r\nhello\r\n"),
    "a chunk of any size": says(CHUNKED, b"f" * 30 + b"\r\nhello\r\n"),
    "chunked for ever": chunked_for_ever,
    "for ever": for_ever,
    "an error for ever": error_for_ever,
    "gzip": says(RIGHT + "\ncontent-encoding: gzip"),
    "a bomb in the transport": says(f"HTTP/1.1 200 OK\ncontent-length: {len(ZSTD)}\ncontent-encoding: zstd", ZSTD),
    "another part": says("HTTP/1.1 206 x\ncontent-length: 10\ncontent-range: bytes 5-14/{n}", b"x" * 10),
    "a part of another whole": says("HTTP/1.1 206 x\ncontent-length: 10\ncontent-range: bytes 0-9/10", b"x" * 10),
    "a part that it does not name": says("HTTP/1.1 206 x\ncontent-length: {n}"),
    "parts": says("HTTP/1.1 206 x\ncontent-length: 10\ncontent-type: multipart/byteranges; boundary=x", b"x" * 10),
    "101": says("HTTP/1.1 101 x\nupgrade: x\nconnection: upgrade", b""),
    "304": says("HTTP/1.1 304 x", b""),
    "300": says("HTTP/1.1 300 x\ncontent-length: 0", b""),
    "416": says("HTTP/1.1 416 x\ncontent-length: 0", b""),
    "500": says("HTTP/1.1 500 x\ncontent-length: 0", b""),
    "999": says("HTTP/1.1 999 x\ncontent-length: 0", b""),
    "other bytes": other_bytes,
    "a redirect without a place": says("HTTP/1.1 302 x\ncontent-length: 0", b""),
    "a redirect to a file": redirect("file:///etc/passwd"),
    "a redirect to ftp": redirect("ftp://127.0.0.1/x"),
    "a redirect to no place": redirect("http://[::1"),
    "a redirect to nobody": redirect("http://127.0.0.1:1/"),
}


SLOW = {name for name in LIES if "silent" in name} | {"1xx for ever", "a header for ever", "headers for ever"}


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_costs_one_more_request(name: str, world: World, impatient: Callable[[], None]) -> None:
    if name in SLOW:
        impatient()
    world.liar.lies[world.victim] = [LIES[name]]
    tracemalloc.start()
    try:
        assert await world.get() is None
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    c = world.cache.counters
    if name not in SLOW:  # where a busy machine looks like silence
        assert (world.liar.times(world.victim), c.retries + c.wrong_blobs) == (2, 1)
    assert world.liar.times(world.victim) >= 2
    assert c.network_bytes < 3 * SIZE
    assert world.client.credentials == Credentials(world.liar.url)


@pytest.mark.parametrize("lie", [no_length, more_than_it_says], ids=["HTTP/1.0", "more than it says"])
async def test_a_strange_reply_with_the_right_bytes_is_right(lie: Lie, world: World) -> None:
    world.liar.always[world.victim] = lie
    assert await world.get() is None
    assert world.liar.times(world.victim) == 1


# -- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", [cut_at_99_percent, no_length_cut, reset_in_body])
async def test_a_cut_transfer_goes_on_where_it_was(lie: Lie, world: World) -> None:
    world.liar.lies[world.victim] = [lie]
    assert await world.get() is None
    first, second = [a for a in world.liar.asked if a.digest == world.victim]
    assert "range" not in first.headers
    if lie is not reset_in_body:  # after a reset the system drops what was not read
        assert second.offset == {cut_at_99_percent: SIZE * 99 // 100, no_length_cut: 100_000}[lie]
    blobs = {a.digest: len(a.data) for a in world.liar.asked}
    assert world.cache.counters.network_bytes == sum(blobs.values())  # no byte twice, the manifest included


# Each with the number of requests that it takes in all.
AGAIN: dict[str, tuple[Lie, int]] = {
    "200": (lambda a: a.reply(200, a.data), 2),
    "an earlier part": (lambda a: a.reply(206, a.data[7:], content_range=span(a, 7)), 2),
    "416": (says("HTTP/1.1 416 x\ncontent-length: 0\ncontent-range: bytes */10", b""), 3),
    "a later part": (lambda a: a.reply(206, b"x", content_range=span(a, len(a.data) - 1)), 3),
    "nothing, and no length": (lambda a: a.reply(206, b"", content_range=span(a, a.offset), content_length=None), 3),
    "parts": (says("HTTP/1.1 206 x\ncontent-type: multipart/byteranges; boundary=x", b"--x--"), 3),
    "the start": (lambda a: a.reply(206, a.data[: len(a.data) - a.offset], content_range=span(a, a.offset)), 3),
    "a cut again": (lambda a: a.reply(206, b"", content_range=span(a, a.offset), content_length=3000), 3),
}


def span(a: Asked, start: int) -> str:
    return f"bytes {start}-{len(a.data) - 1}/{len(a.data)}"


@pytest.mark.parametrize(("lie", "times"), AGAIN.values(), ids=AGAIN)
async def test_a_lie_about_the_rest_is_no_harm(lie: Lie, times: int, world: World) -> None:
    world.liar.lies[world.victim] = [cut_at_99_percent, lie]
    assert await world.get() is None
    assert world.liar.times(world.victim) == times
    assert world.cache.counters.network_bytes < 3 * SIZE


# -- for good --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Lie, str, int]] = {
    "other bytes": (other_bytes, "blob_refused", 2),
    "too long": (says("HTTP/1.1 200 OK\ncontent-length: {more}"), "blob_refused", 2),
    "too short": (says("HTTP/1.1 200 OK\ncontent-length: {less}"), "blob_refused", 2),
    "for ever": (for_ever, "blob_refused", 2),
    "chunked for ever": (chunked_for_ever, "blob_refused", 2),
    "short, no length": (no_length_cut, "blob_refused", 4),
    "416": (says("HTTP/1.1 416 x\ncontent-length: 0", b""), "blob_refused", 2),
    "204": (says("HTTP/1.1 204 x", b""), "http_204", 1),
    "404": (says("HTTP/1.1 404 x\ncontent-length: 0", b""), "http_404", 1),
    "405 with a page that does not end": (long_head(b"x" * 1000, b"HTTP/1.1 405 x\r\n\r\n"), "http_405", 1),
    "405 with a page that drips": (long_head(b"x", b"HTTP/1.1 405 x\r\n\r\n", 0.05), "http_405", 1),
}


@pytest.mark.parametrize(("lie", "code", "times"), REFUSED.values(), ids=REFUSED)
async def test_what_stays_wrong_is_refused_by_name(
    lie: Lie, code: str, times: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.25)  # for the page of an error
    world.liar.always[world.victim] = lie
    assert await world.get() == code
    assert world.error is not None
    assert world.victim in world.error.message
    assert world.error.hint
    assert world.liar.times(world.victim) == times
    assert world.cache.counters.network_bytes < 4 * SIZE
    world.liar.always.clear()
    assert await world.get() is None


ENDLESS = {"a circle": around, "gopher": redirect("gopher://x/"), "silence": silent, "gzip": LIES["gzip"]}


@pytest.mark.parametrize("lie", ENDLESS.values(), ids=ENDLESS)
async def test_what_may_be_over_soon_is_tried_again_and_told_until_a_stop(
    lie: Lie, world: World, impatient: Callable[[], None]
) -> None:
    """How much time lies between is in test_transfer.py."""
    impatient()
    world.liar.always[world.victim] = lie

    async def get() -> None:
        raise AssertionError(await world.get())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get)
        while world.cache.counters.retries < 3:  # noqa: ASYNC110
            await trio.sleep(0.005)
        (condition,) = world.cache.health.conditions()
        nursery.cancel_scope.cancel()
    assert (condition.code, "is tried again" in condition.text) == ("model_fetch", True)
    assert not world.cache.health.conditions()
    assert not list((world.cache.store.root / "ready").glob("*/*"))


# -- slow ------------------------------------------------------------------------------------------------------------


async def test_a_drip_holds_up_neither_the_others_nor_a_stop(world: World) -> None:
    """One of two downloads gets a byte now and then."""
    seen: list[int] = []

    async def drip(a: Asked) -> None:
        await a.reply(200, b"", content_length=len(a.data))
        for n in range(len(a.data)):
            await a.send(a.data[n : n + 1])
            seen.append(n)
            await trio.sleep(0.002)

    world.liar.always[world.victim] = drip
    others = {a.name for a in (world.liar.data / "models/blobs").glob("??/*")} - {world.victim}
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.get)
            stored = world.cache.store.has_blob
            while not all(map(stored, others)) or len(seen) < 50:  # noqa: ASYNC110
                await trio.sleep(0.005)
            before = world.cache.counters.network_bytes
            while world.cache.counters.network_bytes == before:  # noqa: ASYNC110
                await trio.sleep(0.005)
            scope.cancel()
    assert scope.cancelled_caught
    assert world.liar.times(world.victim) == 1
    assert world.cache.counters.stalls == 0


# -- redirects -------------------------------------------------------------------------------------------------------


async def test_a_circle_is_left_after_five_steps(world: World) -> None:
    world.liar.lies[world.victim] = [around] * 6
    assert await world.get() is None
    assert world.liar.times(world.victim) == 7
    assert world.cache.counters.retries == 1


async def test_another_host_gets_no_credentials_and_has_no_say(world: World, nursery: trio.Nursery) -> None:
    """What it says of tokens and agents is not the router's word, and its clock is not the router's."""
    other = Liar(world.liar.data)
    await other.serve(nursery)

    def elsewhere(a: Asked) -> Any:
        return a.reply(302, b"", location=f"{other.url}/v1/models/blobs/{a.digest}", set_cookie="a=b")

    def problem(status: int, code: str) -> Lie:
        return lambda a: a.reply(status, f'{{"code": "{code}"}}'.encode(), date="Mon, 01 Jan 2001 00:00:00 GMT")

    world.liar.always[world.victim] = elsewhere
    for status, code in (
        (410, "agent_removed"),
        (401, "token_invalid"),
        (403, "agent_suspended"),
        (409, "identity_in_use"),
    ):
        other.lies[world.victim] = [problem(status, code)]
        assert await world.get() == f"http_{status}"
    assert await world.get() is None
    assert world.client.skew is None
    assert world.client.credentials == Credentials(world.liar.url)
    secrets = {"authorization", "cookie", "xim-protocol", "dpop"}
    assert all("authorization" in asked.headers for asked in world.liar.asked)
    assert not any(secrets & asked.headers.keys() for asked in other.asked)
