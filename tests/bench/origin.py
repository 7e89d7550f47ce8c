"""A file server for the benchmark that costs less than any client: sendfile, Range, paths of a router and of a hub.

`python origin.py ROUTER_DATA FILES BYTES_PER_S` prints its port. Below ROUTER_DATA lie a router's blobs and manifests,
below FILES plain files (/files/…, and those in its `model` as the hub's repository bench/model). One
budget of BYTES_PER_S (0: no limit) for all connections together stands for the link.
"""

import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path

_COMMIT = "0" * 40
_PIECE = 64 * 1024
_BURST = 0.05  # seconds; else what each sleep takes too long would be lost to the link


class Link:
    """Sends whole pieces, each when the link would have carried all before it."""

    def __init__(self, rate: float) -> None:
        self._rate, self._lock, self._free = rate, threading.Lock(), 0.0

    def wait(self, amount: int) -> None:
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now - _BURST) + amount / self._rate
            pause = self._free - now
        time.sleep(max(0.0, pause))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    data: Path
    plain: Path
    link: Link

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            return self._listing()
        file = self._file(path)
        if file is None or not file.is_file():
            return self._reply(404, 0)
        size = file.stat().st_size
        start, _, end = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = int(start), min(int(end or size - 1), size - 1)
        part = "range" in self.headers
        self._reply(206 if part else 200, last + 1 - first, f"bytes {first}-{last}/{size}" if part else "")
        if self.command == "GET":
            self._send(file, first, last + 1)
        return None

    do_HEAD = do_GET

    def _file(self, path: str) -> Path | None:
        kind, _, name = path.lstrip("/").partition("/")
        if path.startswith("/v1/models/manifests/"):
            return self.data / "models/manifests" / (path.rpartition("/")[2] + ".json")
        if path.startswith("/v1/models/blobs/"):
            digest = path.rpartition("/")[2]
            return self.data / "models/blobs" / digest[:2] / digest
        if kind == "files":
            return self.plain / name
        return self.plain / "model" / path.partition("/resolve/")[2].partition("/")[2] if "/resolve/" in path else None

    def _listing(self) -> None:
        files = sorted((self.plain / "model").iterdir())
        tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _COMMIT} for p in files]
        siblings = [{"rfilename": p.name} for p in files]
        model = {"id": "bench/model", "sha": _COMMIT, "private": False, "tags": [], "siblings": siblings}
        body = json.dumps(tree if "/tree/" in self.path else model).encode()
        self._reply(200, len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def _reply(self, status: int, size: int, span: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(size), "Accept-Ranges": "bytes", "X-Repo-Commit": _COMMIT}
        headers |= {"ETag": f'"{abs(hash(self.path)):x}"'} | ({"Content-Range": span} if span else {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, file: Path, start: int, end: int) -> None:
        self.wfile.flush()
        with file.open("rb", buffering=0) as source:
            while start < end:
                amount = min(_PIECE if self.link._rate else end - start, end - start)
                self.link.wait(amount)
                start += os.sendfile(self.connection.fileno(), source.fileno(), start, amount)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    Handler.data, Handler.plain, Handler.link = Path(sys.argv[1]), Path(sys.argv[2]), Link(float(sys.argv[3]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
