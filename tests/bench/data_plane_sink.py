"""A router that gives leases and acknowledges their frames, to measure an agent with:

`python data_plane_sink.py PORT TIMES REQUESTS PIECES STREAMS SECONDS`. Polls and events as in wire-protocol §5, without
identity, and content is checked by its CRC. What comes in a call counts as come when its body is there.
"""

import sys
import time
import zlib
from functools import partial
from pathlib import Path

import h11
import trio
from data_plane_load import Load
from data_plane_times import Times

from xim_agent.mesh import codec
from xim_agent.mesh.content import pack, unpack
from xim_agent.mesh.messages import MAX_EVENTS, End, EventsReply, Head, Lease, PollReply
from xim_agent.watch import Watch

CREDIT = 256 * 1024


class Held:
    """One lease: request `n`; frames that came too early wait in `early`."""

    def __init__(self, n: int) -> None:
        self.n, self.at, self.crc, self.next, self.got, self.granted = n, 0, 0, 0, 0, CREDIT
        self.early: dict[int, object] = {}


class Sink:
    def __init__(self, load: Load) -> None:
        self.load = load
        self.leases: dict[int, Held] = {}
        self.ids = 0
        self.changed = Watch()

    async def poll(self, data: bytes) -> bytes:
        asked = codec.decode_poll_request(data)
        room = asked.capacity
        with trio.move_on_after(asked.wait_ms / 1000):
            while not (room and self.load.due(len(self.leases))):
                await self.changed.wait_beyond(self.changed.version)
        leases = []
        while len(leases) < room and self.load.due(len(self.leases)):
            leases.append(self.lease())
        return codec.encode(PollReply(leases=leases))

    def lease(self) -> Lease:
        n, body = self.load.body()
        self.ids += 1
        self.leases[self.ids] = Held(n)
        headers = {"content-type": "application/json"}
        return Lease(
            id=self.ids, request=f"r{n}", method="POST", path="/v1/chat/completions", headers=headers, body=body,
            stream=True, tenant="t", deadline_ms=600_000, credit=CREDIT,
        )  # fmt: skip

    async def events(self, data: bytes) -> bytes:
        now, acked, credit = time.monotonic(), {}, {}
        unknown = []
        for raw in codec.decode_events_request(data).frames:
            lease, seq, _, payload = codec.decode_frame(raw)
            held = self.leases.get(lease)
            if held is None:
                unknown.append(lease)
                continue
            if seq >= held.next:
                held.early[seq] = payload
            while held.next in held.early:
                self.take(lease, held, held.early.pop(held.next), now)
                held.next += 1
            acked[lease] = held.next - 1
            if held.granted - held.got < CREDIT // 2:
                credit[lease] = held.granted = held.got + CREDIT
        return codec.encode(EventsReply(acked, credit, [], unknown))

    def take(self, lease: int, held: Held, payload: object, now: float) -> None:
        if isinstance(payload, bytes):
            count = payload.count(b"\n\n")
            self.load.piece(held.n, held.at, count, now)
            held.at += count
            held.got += len(payload)
            held.crc = zlib.crc32(payload, held.crc)
        elif not isinstance(payload, Head):
            good = isinstance(payload, End) and payload.reason == "complete"
            whole = good and held.crc == self.load.times.crc[held.n]
            self.load.whole += whole
            self.load.wrong += not whole
            del self.leases[lease]
            self.changed.bump()

    # HTTP

    async def serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        while True:
            body, target, encoding = bytearray(), "", ""
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(262_144))
                elif isinstance(event, h11.Request):
                    target = event.target.decode()
                    encoding = dict(event.headers).get(b"content-encoding", b"").decode()
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    return
            data = unpack(bytes(body), encoding, MAX_EVENTS)
            if target.endswith("/poll"):
                reply = await self.poll(data)
            else:
                self.load.wire += len(body)
                reply = await self.events(data)
            headers, packed = pack(reply)
            headers |= {
                "content-type": "application/vnd.msgpack",
                "xim-protocol": "1",
                "content-length": str(len(packed)),
            }
            sent = connection.send(h11.Response(status_code=200, headers=list(headers.items())))
            sent += connection.send(h11.Data(packed)) + connection.send(h11.EndOfMessage())
            try:
                await stream.send_all(sent)
            except trio.BrokenResourceError:  # a poll that was replaced
                return
            connection.start_next_cycle()

    async def offer(self) -> None:
        """While the load ramps up, time itself makes leases due."""
        while True:
            await trio.sleep(0.01)
            if self.load.due(len(self.leases)):
                self.changed.bump()

    async def run(self, port: int) -> None:
        begin, end = self.load.window
        async with trio.open_nursery() as nursery:
            listen = partial(trio.serve_tcp, self.serve, port, host="127.0.0.1")
            await nursery.start(listen)
            nursery.start_soon(self.offer)
            print("ready", flush=True)
            for when, what in ((begin, "begin"), (end, "end")):
                await trio.sleep(when - time.monotonic())
                self.load.tell(what)
            await trio.sleep(0.3)
            self.load.report()
            await trio.sleep_forever()  # the agent is to end first


def main() -> None:
    port, times, requests, pieces, streams, seconds = sys.argv[1:]
    load = Load(Times(Path(times), int(requests), int(pieces)), int(streams), int(pieces), float(seconds))
    trio.run(Sink(load).run, int(port))


if __name__ == "__main__":
    main()
