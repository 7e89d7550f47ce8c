"""`ask` against a server that says exactly what the test wants."""

import json

import pytest
import trio

from xim_agent.cli.ask import ask
from xim_agent.errors import AgentError


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


async def asked(body: bytes, status: str = "200 OK") -> None:
    async def one(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        await stream.send_all(head.encode() + body)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, one, [listener])
        await ask(f"http://127.0.0.1:{listener.socket.getsockname()[1]}", "k", "m", "p")
        nursery.cancel_scope.cancel()


async def test_a_whole_answer(capsys: pytest.CaptureFixture[str]) -> None:
    await asked(event("Par") + event("is") + b"data: [DONE]\n\n")
    assert capsys.readouterr().out == "Paris\n"


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (event("Par"), "200 OK", "broke off"),
        (event("Par") + b'data: {"error": {"message": "engine_lost"}}\n\n', "200 OK", "engine_lost"),
        (b'data: {"error": "text"}\n\n', "200 OK", "text"),
        (b"data: nonsense\n\n", "200 OK", "makes no sense"),
        (b'{"error": {"message": "no such model"}}', "404 Not Found", "404"),
    ],
)
async def test_no_part_of_an_answer_passes_for_one(body: bytes, status: str, part: str) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(AgentError, match=part), flatten_subgroups=True):
        await asked(body, status)
