"""A synthetic engine: streams as vLLM's API server does, one event of about 200 bytes per request and period.

`python data_plane_engine.py UNIX_SOCKET TCP_PORT TIMES REQUESTS PIECES PERIOD_MS`; chunked HTTP/1.1 on both sockets. A
request says `"n"` (which one it is) and `"pieces"` (how many it wants). Streams are spread over the period.
"""

import json
import random
import select
import signal
import socket
import sys
import time
import zlib
from pathlib import Path

from data_plane_times import Times

HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Wed, 25 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = (
    b'data: {"id":"chatcmpl-%s","object":"chat.completion.chunk","created":%d,"model":"toy","choices":[{"index":0,'
    b'"delta":{"content":"%s"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"
dice = random.Random(1)
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
WORDS = [(" " + "".join(dice.choices(LETTERS, k=dice.choice((2, 3, 4, 5, 7))))).encode() for _ in range(8192)]


def framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


class Stream:
    """One connection; `left` pieces are still to come."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked = bytearray()
        self.out = bytearray()
        self.left = self.at = self.n = self.crc = 0
        self.id, self.created = b"", 0


class Engine:
    def __init__(self, times: Times, period: float) -> None:
        self.times = times
        self.poll = select.epoll()
        self.streams: dict[int, Stream] = {}
        self.listeners: dict[int, socket.socket] = {}
        # A slot a millisecond; a stream is in the one of its beginning.
        self.slots: list[set[Stream]] = [set() for _ in range(max(1, round(period * 1000)))]

    def listen(self, sock: socket.socket) -> None:
        sock.listen(4096)
        sock.setblocking(False)
        self.listeners[sock.fileno()] = sock
        self.poll.register(sock.fileno(), select.EPOLLIN)

    def run(self) -> None:
        tick = int(time.monotonic() * 1000)
        while True:
            wait = (tick + 1) / 1000 - time.monotonic()
            for fd, _ in self.poll.poll(max(0.0, wait)):
                if fd in self.listeners:
                    self.accept(self.listeners[fd])
                else:
                    self.read(self.streams[fd], tick)
            while tick < int(time.monotonic() * 1000):
                tick += 1
                for stream in list(self.slots[tick % len(self.slots)]):
                    self.step(stream, tick)

    def accept(self, listener: socket.socket) -> None:
        try:
            while True:
                sock, _ = listener.accept()
                sock.setblocking(False)
                if sock.family == socket.AF_INET:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.streams[sock.fileno()] = Stream(sock)
                self.poll.register(sock.fileno(), select.EPOLLIN)
        except BlockingIOError:
            pass

    def read(self, stream: Stream, tick: int) -> None:
        try:
            data = stream.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close(stream)
            return
        stream.asked += data
        head, found, rest = bytes(stream.asked).partition(b"\r\n\r\n")
        if not found:
            return
        length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
        if head.startswith(b"GET "):  # a peer looks whether we are well
            stream.sock.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            stream.asked = bytearray(rest)
        elif len(rest) >= length:
            stream.asked = bytearray(rest[length:])
            self.begin(stream, json.loads(rest[:length]), tick)

    def begin(self, stream: Stream, asked: dict[str, int], tick: int) -> None:
        stream.n, stream.left, stream.at, stream.crc = asked["n"], asked["pieces"], 0, 0
        stream.id, stream.created = b"%016x" % dice.getrandbits(64), int(time.time())
        self.times.length[stream.n] = stream.left
        self.write(stream, HEAD)
        self.slots[tick % len(self.slots)].add(stream)
        self.step(stream, tick)

    def step(self, stream: Stream, tick: int) -> None:
        event = EVENT % (stream.id, stream.created, WORDS[dice.getrandbits(13)])
        stream.crc = zlib.crc32(event, stream.crc)
        self.times.sent[stream.n * self.times.pieces + stream.at] = time.monotonic()
        self.write(stream, framed(event))
        stream.at += 1
        stream.left -= 1
        if not stream.left:
            self.times.crc[stream.n] = zlib.crc32(DONE, stream.crc)
            self.write(stream, framed(DONE))
            self.write(stream, b"0\r\n\r\n")
            for slot in self.slots:
                slot.discard(stream)

    def write(self, stream: Stream, data: bytes) -> None:
        try:
            if stream.out:
                stream.out += data
                del stream.out[: stream.sock.send(stream.out)]
            elif (sent := stream.sock.send(data)) < len(data):
                stream.out += data[sent:]
        except BlockingIOError:
            stream.out = stream.out or bytearray(data)
        except OSError:
            self.close(stream)

    def close(self, stream: Stream) -> None:
        if self.streams.pop(stream.sock.fileno(), None) is not None:
            stream.sock.close()
        for slot in self.slots:
            slot.discard(stream)


def main() -> None:
    path, port, times, requests, pieces, period = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    engine = Engine(Times(Path(times), int(requests), int(pieces)), float(period) / 1000)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    engine.listen(unix)
    tcp = socket.create_server(("127.0.0.1", int(port)))
    engine.listen(tcp)
    print("ready", flush=True)
    engine.run()


if __name__ == "__main__":
    main()
