"""The least that could carry the load, in the agent's place:

`python data_plane_prototype.py ENGINE_SOCKET ROUTER_URL CEILING`. One task reads all answers through one epoll, piece
by piece; every 10 ms what came leaves in one httpx call. Nothing is kept for a second try, no credit is looked at, no
answer is checked: one failed call loses pieces for good. So it shows what a target in microseconds means on the machine
at hand, and what the agent's guarantees cost.
"""

import re
import select
import signal
import socket
import sys
from dataclasses import dataclass

import httpx
import trio
from zstandard import ZstdCompressor

from xim_agent.mesh import codec
from xim_agent.mesh.messages import End, Head, Lease, Load, PollRequest

SIZE = re.compile(rb"([0-9a-f]+)\r\n")
HEADERS = {"content-type": "application/vnd.msgpack", "authorization": "Bearer " + "e" * 400}
compressor = ZstdCompressor(level=1)


@dataclass(eq=False)
class Answer:
    sock: socket.socket
    lease: int
    seq: int = 0
    size: int = 0
    chunks: int = 0


class Prototype:
    def __init__(self, engine: str, url: str, ceiling: int) -> None:
        self.engine, self.url, self.ceiling = engine, url, ceiling
        self.answers: dict[int, Answer] = {}
        self.epoll = select.epoll()
        self.frames: list[bytes] = []

    async def poll(self, client: httpx.AsyncClient) -> None:
        n = 0
        while True:
            n += 1
            held = [answer.lease for answer in self.answers.values()]
            asked = PollRequest(
                boot="bench", n=n, phase="ready", capacity=self.ceiling - len(held), wait_ms=25_000, held=held,
                model=None, ceiling=self.ceiling, load=Load(), progress=None, health=[],
            )  # fmt: skip
            reply = await client.post(f"{self.url}/v1/work/poll", content=codec.encode(asked), headers=HEADERS)
            for lease in codec.decode_poll_reply(reply.content).leases:
                self.ask(lease)

    def ask(self, lease: Lease) -> None:
        assert lease.body is not None
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.engine)
        sock.sendall(b"POST %b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n" % lease.path.encode())
        sock.sendall(b"content-length: %d\r\n\r\n" % len(lease.body) + lease.body)
        sock.setblocking(False)
        self.answers[sock.fileno()] = Answer(sock, lease.id)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    async def read(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.epoll.fileno())
            for fd, _ in self.epoll.poll(0, 512):
                self.take(fd, self.answers[fd])

    def take(self, fd: int, answer: Answer) -> None:
        data, at = answer.sock.recv(65536), 0
        if not answer.seq:
            at = data.index(b"\r\n\r\n") + 4
            self.put(answer, "head", Head(200, {"content-type": "text/event-stream"}))
        parts = []
        while found := SIZE.match(data, at):
            begin, size = found.end(), int(found[1], 16)
            parts.append(data[begin : begin + size])
            at = begin + size + 2
        if piece := b"".join(parts):
            answer.size += len(piece)
            answer.chunks += 1
            self.put(answer, "data", piece)
        if data.endswith(b"\r\n0\r\n\r\n"):
            self.put(answer, "end", End("complete", answer.size, answer.chunks, 0, 0))
            del self.answers[fd]
            answer.sock.close()

    def put(self, answer: Answer, kind: codec.Kind, payload: codec.Payload) -> None:
        self.frames.append(codec.encode_frame(answer.lease, answer.seq, kind, payload))
        answer.seq += 1

    async def send(self, client: httpx.AsyncClient) -> None:
        while True:
            await trio.sleep(0.010)
            if self.frames:
                body = compressor.compress(codec.encode_events("bench", self.frames))
                self.frames.clear()
                headers = {**HEADERS, "content-encoding": "zstd"}
                await client.post(f"{self.url}/v1/work/events", content=body, headers=headers)

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client, trio.open_nursery() as nursery:
            nursery.start_soon(self.poll, client)
            nursery.start_soon(self.read)
            nursery.start_soon(self.send, client)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(Prototype(sys.argv[1], sys.argv[2], int(sys.argv[3])).run)
