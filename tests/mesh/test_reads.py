from typing import Any

import trio

from xim_agent.mesh.sockets import READ


async def test_what_has_come_is_read_in_large_pieces(client: Any, start: Any, login: Any, answer: Any) -> None:
    size = 4 * 1024 * 1024

    async def reply(call: Any) -> Any:
        return answer(200, body=bytes(size))

    server = await start(reply)
    client.credentials = login(server.url)
    async with client.blob("ab", 0) as blob:
        pieces = []
        async for piece in blob.chunks():
            pieces.append(len(piece))
            await trio.testing.wait_all_tasks_blocked()  # the server has sent what the socket takes
    assert sum(pieces) == size
    assert 64 * 1024 < max(pieces) <= READ
