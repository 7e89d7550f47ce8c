"""Clients that stream through whatever listens:

`python data_plane_client.py ADDRESS TIMES REQUESTS PIECES STREAMS SECONDS`.
ADDRESS: a port of this machine, or the path of a Unix socket. One thread over one epoll, so that it is light.
"""

import os
import select
import socket
import sys
import time
from pathlib import Path

from data_plane_load import Load
from data_plane_times import Times

END = b"\r\n0\r\n\r\n"


class Reader:
    def __init__(self, sock: socket.socket, n: int, request: bytes) -> None:
        self.sock, self.n, self.request = sock, n, request
        self.at = 0
        self.tail = b""


class Clients:
    def __init__(self, load: Load, address: str) -> None:
        self.load, self.address = load, address
        self.poll = select.epoll()
        self.readers: dict[int, Reader] = {}

    def run(self) -> None:
        begin, end = self.load.window
        marks = [(begin, "begin"), (end, "end"), (end + 0.2, "")]
        while True:
            while self.load.due(len(self.readers)):
                self.ask()
            for fd, _ in self.poll.poll(0.005):
                self.read(self.readers[fd])
            if time.monotonic() >= marks[0][0]:
                _, what = marks.pop(0)
                if not what:
                    return
                self.load.tell(what)

    def ask(self) -> None:
        n, body = self.load.body()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        if key := os.environ.get("XIM_BENCH_KEY"):
            head += b"authorization: Bearer %b\r\n" % key.encode()
        request = head + b"content-length: %d\r\n\r\n" % len(body) + body
        unix = "/" in self.address
        sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        sock.connect(self.address if unix else ("127.0.0.1", int(self.address)))
        sock.send(request)
        sock.setblocking(False)
        self.readers[sock.fileno()] = Reader(sock, n, request)
        self.poll.register(sock.fileno(), select.EPOLLIN)

    def read(self, reader: Reader) -> None:
        try:
            data = reader.sock.recv(65536)
        except OSError:
            data = b""
        self.load.wire += len(data)
        count = data.count(b"\n\n") + (data[:1] == b"\n" and reader.tail[-1:] == b"\n")
        if count:
            self.load.piece(reader.n, reader.at, count, time.monotonic())
            reader.at += count
        reader.tail = (reader.tail + data)[-len(END) :]
        if not data or reader.tail == END:
            asked = self.load.times.length[reader.n]
            whole = reader.tail == END and (reader.at == asked + 1 or bool(self.load.model and reader.at))
            self.load.whole += whole
            self.load.wrong += not whole
            del self.readers[reader.sock.fileno()]
            reader.sock.close()


def main() -> None:
    address, times, requests, pieces, streams, seconds = sys.argv[1:]
    load = Load(Times(Path(times), int(requests), int(pieces)), int(streams), int(pieces), float(seconds))
    Clients(load, address).run()
    load.report()


if __name__ == "__main__":
    main()
