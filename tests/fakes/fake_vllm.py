#!/usr/bin/env python3
"""Plays `vllm serve DIR --uds PATH`: standard library only, one file, behaves as the environment and the request say.

Environment (given to it by the agent's VLLM_ENV, or the operator's environment):
  FAKE_VLLM_START_SECONDS   how long it loads before it listens (0)
  FAKE_VLLM_START_SILENT    1: neither writes nor uses the CPU while it loads
  FAKE_VLLM_START_IGNORES_TERM  1: SIGTERM does nothing before it listens (real vLLM: over 30 s)
  FAKE_VLLM_EXIT            exits with this status instead of listening, after writing FAKE_VLLM_STDERR
  FAKE_VLLM_STDERR          text for stderr at start
  FAKE_VLLM_SAYS            file; what is in it is written to stdout and stderr at start, and is in /metrics
  FAKE_VLLM_COUNT           file; each start appends one line (its pid)
  FAKE_VLLM_EXIT_FIRST      n: only the first n starts exit as FAKE_VLLM_EXIT says (needs FAKE_VLLM_COUNT)
  FAKE_VLLM_LACKS           flags that this version does not know: neither in its help nor accepted
  FAKE_VLLM_CHATTER         bytes written to stdout and to stderr at start, each
  FAKE_VLLM_CORE            1: forks an "EngineCore" with its own session that ignores SIGTERM and never ends by itself.
                            While it is stopped (SIGSTOP) the engine hangs; when it is gone the server exits with 1
  FAKE_VLLM_WORKER          1: the EngineCore forks a "worker" alike; when that is gone, it exits with 1
  FAKE_VLLM_OOM             core or worker: which of them obeys `oom` (the last there is)
  FAKE_VLLM_SURVIVES        the server does not exit when its core is gone: 503 = /health says so, 200 = it does not
  FAKE_VLLM_LATE            seconds that the words `late_health` and `late_metrics` delay these answers by (6)
  FAKE_VLLM_SHM             1: makes and maps /dev/shm/psm_<random> in the EngineCore (else in itself), never removed
  FAKE_VLLM_NEVER_HEALTHY   1: /health answers 503
  FAKE_VLLM_PROMPT_FAILS    status that the generate paths answer with (readiness fails although /health is 200)
  FAKE_VLLM_TOKENS, FAKE_VLLM_DELAY   tokens of an answer when the request says nothing (16), seconds between two (0)
  FAKE_VLLM_CONTROL         file of words, read before every token and every 50 ms: `hang` (health 200, counters and
                            tokens stand still), `saturated` (counters move, tokens do not), `prefill` (of what the
                            core tells only the use of its KV cache moves), `compute` (nothing moves, the core uses its
                            CPU), `late_health`, `late_metrics`, `sick` (health 503), `die` (exits with 9), `oom` (core
                            or worker takes memory until a cgroup's limit kills it; after 256 MiB an RLIMIT_AS refuses)
Request fields: `max_tokens`, and `fake`: {"delay": s, "first_delay": s, "error_after": n (what vLLM sends when it loses
its engine: an error event, then [DONE], then a clean end), "cut_after": n (socket closed), "die_after": n (exits)}.
"""

import contextlib
import hashlib
import http.server
import json
import mmap
import os
import re
import resource
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, ClassVar

ENV = os.environ
HELP = """usage: vllm serve [model_tag] [options]

options:
  --uds UDS             Unix domain socket path.
  --served-model-name SERVED_MODEL_NAME [SERVED_MODEL_NAME ...]
  --shutdown-timeout SHUTDOWN_TIMEOUT
  --max-model-len MAX_MODEL_LEN
  --max-num-seqs MAX_NUM_SEQS
  --max-num-batched-tokens MAX_NUM_BATCHED_TOKENS
  --tensor-parallel-size, -tp TENSOR_PARALLEL_SIZE
  --pipeline-parallel-size, -pp PIPELINE_PARALLEL_SIZE
  --distributed-executor-backend {mp,ray}
  --gpu-memory-utilization GPU_MEMORY_UTILIZATION
  --quantization, -q QUANTIZATION
  --kv-offloading-size KV_OFFLOADING_SIZE
  --kv-offloading-backend {lmcache,native}
  --speculative-config, -sc SPECULATIVE_CONFIG
  --enable-prefix-caching, --no-enable-prefix-caching
  --enable-prompt-tokens-details, --no-enable-prompt-tokens-details
  --disable-uvicorn-access-log, --no-disable-uvicorn-access-log
  --allowed-media-domains ALLOWED_MEDIA_DOMAINS [ALLOWED_MEDIA_DOMAINS ...]
  --enforce-eager, --no-enforce-eager
  --runner {auto,draft,generate,pooling}
  --api-key API_KEY [API_KEY ...]
  --kv-transfer-config KV_TRANSFER_CONFIG
  --dtype {auto,bfloat16,float,float16,float32,half}
  --seed SEED
"""
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")


def said() -> str:
    path = Path(ENV.get("FAKE_VLLM_SAYS") or "/nonexistent")
    return path.read_text() if path.exists() else ""


CORE = 0


def told() -> frozenset[str]:
    with contextlib.suppress(OSError, KeyError):
        return frozenset(Path(ENV["FAKE_VLLM_CONTROL"]).read_text().split())
    return frozenset()


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


class Engine:
    """What EngineCore would know: the counters behind /metrics, and the switch that makes it stand still."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = self.steps = self.generated = self.prompted = self.aborted = self.finished = 0
        self.draining = self.lost = False
        self.words: frozenset[str] = frozenset()
        self.prefilled = 0
        self.reported = 0  # running requests, as the core last told
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.05)
            if "saturated" in self.words:
                self.steps += 1
            if "prefill" in self.words:
                self.prefilled += 1
            if not self.words & {"hang", "compute"}:
                self.reported = self.running

    def look(self) -> None:
        words = told()
        if CORE:
            state = process_state(CORE)
            if state in "ZX":
                if not self.lost:
                    say("Engine core proc EngineCore died unexpectedly, shutting down client.", "ERROR")
                self.lost = True
                if "FAKE_VLLM_SURVIVES" not in ENV:
                    os._exit(1)
                words |= {"hang", "sick"} if ENV["FAKE_VLLM_SURVIVES"] == "503" else {"hang"}
            if state == "T":
                words |= {"hang"}
        self.words = words
        if "die" in words:
            os._exit(9)

    def standing(self) -> bool:
        return bool(self.words & {"hang", "saturated", "prefill", "compute"})

    def metrics(self, model: str) -> str:
        label = f'{{engine="0",model_name="{model}"}}'
        return (
            "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
            "# TYPE vllm:num_requests_running gauge\n"
            f"vllm:num_requests_running{label} {float(self.reported)}\n"
            f"vllm:num_requests_waiting{label} 0.0\n"
            f"vllm:kv_cache_usage_perc{label} {min(1.0, (self.reported + self.prefilled / 100) / 64)}\n"
            f"vllm:prompt_tokens_total{label} {float(self.prompted)}\n"
            f"vllm:generation_tokens_total{label} {float(self.generated)}\n"
            f"vllm:iteration_tokens_total_count{label} {float(self.steps)}\n"
            f'vllm:request_success_total{{finished_reason="abort",model_name="{model}"}} {float(self.aborted)}\n'
            f'vllm:request_success_total{{finished_reason="stop",model_name="{model}"}} {float(self.finished)}\n'
            'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="4096"} 1.0\n'
            + "".join(f"# {line}\n" for line in said().splitlines())
        )


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: ClassVar[Engine]
    model: ClassVar[str]
    server_version = "uvicorn"

    def address_string(self) -> str:
        return "uds"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, status: int, value: Any) -> None:
        self.reply(status, json.dumps(value).encode())

    def fail(self, status: int, text: str) -> None:
        self.json(status, {"error": {"message": text, "type": "BadRequestError", "param": None, "code": status}})

    def do_GET(self) -> None:
        if f"late_{self.path[1:]}" in self.engine.words:
            time.sleep(float(ENV.get("FAKE_VLLM_LATE", 6)))
        if self.path == "/health":
            sick = ENV.get("FAKE_VLLM_NEVER_HEALTHY") == "1" or "sick" in self.engine.words
            self.reply(503 if sick else 200, b"")
        elif self.path == "/metrics":
            self.reply(200, self.engine.metrics(self.model).encode(), "text/plain; version=0.0.4")
        elif self.path == "/v1/models":
            self.json(200, {"object": "list", "data": [{"id": self.model, "object": "model", "max_model_len": 2048}]})
        elif self.path == "/fake":
            self.json(200, {"argv": sys.argv, "env": dict(ENV), "pid": os.getpid()})
        else:
            self.fail(404, "Not Found")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.engine.draining:
            return self.fail(503, "Server is shutting down")
        try:
            body = json.loads(raw)
        except ValueError:
            return self.fail(400, "The request body is not JSON")
        if body.get("model", self.model) != self.model:
            return self.fail(404, f"The model `{body['model']}` does not exist.")
        if status := ENV.get("FAKE_VLLM_PROMPT_FAILS"):
            return self.fail(int(status), "EngineCore encountered an issue")
        path = self.path
        if path in ("/v1/chat/completions", "/v1/completions"):
            return self.generate(body, chat=path == "/v1/chat/completions")
        if path == "/v1/embeddings":
            return self.embed(body)
        if path == "/tokenize":
            tokens = list(str(body.get("prompt", "")).encode())
            return self.json(200, {"tokens": tokens, "count": len(tokens), "max_model_len": 2048})
        if path == "/v1/score":
            return self.json(200, {"object": "list", "data": [{"index": 0, "object": "score", "score": 0.5}]})
        return self.fail(404, "Not Found")

    def gone(self) -> bool:
        """True when the client has closed its end."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def pause(self, seconds: float) -> None:
        """Waits at least so long, and as long as the engine hangs; raises BrokenPipeError when the client goes away."""
        until = time.monotonic() + seconds
        while time.monotonic() < until or self.engine.standing():
            if self.gone():
                raise BrokenPipeError
            time.sleep(min(0.01, max(0.0, until - time.monotonic()) + 0.001))

    def generate(self, body: dict[str, Any], *, chat: bool) -> None:
        fake = body.get("fake") or {}
        count = body.get("max_tokens") or body.get("max_completion_tokens") or int(ENV.get("FAKE_VLLM_TOKENS", 16))
        delay = float(fake.get("delay", ENV.get("FAKE_VLLM_DELAY", 0)))
        prompt = json.dumps(body["messages"] if chat else body["prompt"])
        seed = zlib.crc32(prompt.encode()) + int(body.get("seed") or 0)
        digest = hashlib.sha256(str(seed).encode()).hexdigest()
        made = Answer(self, chat=chat, ident=f"cmpl-{digest[:16]}", stream=bool(body.get("stream")), body=body)
        engine = self.engine
        with engine.lock:
            engine.running += 1
            engine.prompted += len(prompt)
        try:
            self.pause(float(fake.get("first_delay", 0)))
            made.start()
            for index in range(count):
                self.pause(delay if index else 0)
                if self.gone():
                    raise BrokenPipeError
                if made.broken(fake, index):
                    return
                with engine.lock:
                    engine.steps += 1
                    engine.generated += 1
                made.token(WORDS[(seed + index * 7) % len(WORDS)] + " ", index)
            made.finish(len(prompt), count)
            engine.finished += 1
        except (BrokenPipeError, ConnectionResetError):
            engine.aborted += 1
            self.close_connection = True
        finally:
            with engine.lock:
                engine.running -= 1

    def embed(self, body: dict[str, Any]) -> None:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        self.engine.steps += 1
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": [b / 255 for b in hashlib.sha256(str(t).encode()).digest()[:8]],
            }
            for i, t in enumerate(inputs)
        ]
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        self.json(200, {"object": "list", "model": self.model, "data": data, "usage": usage})


class Answer:
    """One OpenAI-shaped answer, streamed or whole."""

    def __init__(self, handler: Handler, *, chat: bool, ident: str, stream: bool, body: dict[str, Any]) -> None:
        self.h, self.chat, self.ident, self.stream, self.body = handler, chat, ident, stream, body
        self.text = ""
        self.made = int(time.time())

    def start(self) -> None:
        if self.stream:
            self.h.send_response(200)
            self.h.send_header("content-type", "text/event-stream; charset=utf-8")
            self.h.send_header("transfer-encoding", "chunked")
            self.h.end_headers()
            if self.chat:
                self._event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def _chunk(self, data: bytes) -> None:
        self.h.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.h.wfile.flush()

    def _event(self, choices: list[Any], **more: Any) -> None:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        value = {
            "id": self.ident,
            "object": kind,
            "created": self.made,
            "model": self.h.model,
            "choices": choices,
            **more,
        }
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def token(self, text: str, index: int) -> None:
        self.text += text
        if self.stream:
            part = {"delta": {"content": text}} if self.chat else {"text": text}
            self._event([{"index": 0, **part, "finish_reason": None}])

    def broken(self, fake: dict[str, Any], index: int) -> bool:
        """Ends the answer as a failing vLLM would, when the request asks for it at this token."""
        if fake.get("die_after") == index:
            os._exit(9)
        if fake.get("cut_after") == index:
            self.h.connection.shutdown(socket.SHUT_RDWR)
            raise BrokenPipeError
        if fake.get("error_after") == index:
            error = {
                "error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}
            }
            if self.stream:
                self._chunk(b"data: " + json.dumps(error).encode() + b"\n\n")
                self._chunk(b"data: [DONE]\n\n")
                self.h.wfile.write(b"0\r\n\r\n")
            else:
                self.h.json(500, error)
            return True
        return False

    def finish(self, prompt_tokens: int, count: int) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": count, "total_tokens": prompt_tokens + count}
        if not self.stream:
            done = {"message": {"role": "assistant", "content": self.text}} if self.chat else {"text": self.text}
            kind = "chat.completion" if self.chat else "text_completion"
            choices = [{"index": 0, **done, "finish_reason": "length", "logprobs": None}]
            value = {"id": self.ident, "object": kind, "created": self.made, "model": self.h.model}
            return self.h.json(200, {**value, "choices": choices, "usage": usage})
        self._event([{"index": 0, **({"delta": {}} if self.chat else {"text": ""}), "finish_reason": "length"}])
        if (self.body.get("stream_options") or {}).get("include_usage"):
            self._event([], usage=usage)
        self._chunk(b"data: [DONE]\n\n")
        self.h.wfile.write(b"0\r\n\r\n")
        return None


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, request: Any, client_address: Any) -> None:
        """uvicorn says nothing of a client that leaves, be it with the head of an answer that has no body."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


def say(text: str, level: str = "INFO") -> None:
    print(f"{level} {time.strftime('%m-%d %H:%M:%S')} [fake_vllm.py:1] {text}", file=sys.stderr, flush=True)


def make_shm() -> mmap.mmap:
    path = Path("/dev/shm") / f"psm_{os.urandom(4).hex()}"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.truncate(fd, 4096)
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    return mapped


def fork_core(name: str = "core") -> int:
    """A process with its own session, deaf to SIGTERM; returns its pid."""
    if pid := os.fork():
        return pid
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = 0
    if ENV.pop("FAKE_VLLM_WORKER", "") == "1":
        worker = fork_core("worker")
    hungry = name == (ENV.get("FAKE_VLLM_OOM") or ("core" if not worker and name == "core" else "worker"))
    kept = [make_shm()] if ENV.get("FAKE_VLLM_SHM") == "1" else []
    while True:
        words = told()
        time.sleep(0.0 if "compute" in words else 0.05)
        if worker and process_state(worker) in "ZX":
            os._exit(1)
        if worker and not hungry:
            continue
        while "compute" in words and time.monotonic() % 0.1 > 0.001:
            pass
        if hungry and "oom" in words:
            most = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + (1 << 28)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            while True:
                kept.append(mmap.mmap(-1, 1 << 24))
                kept[-1].write(b"x" * (1 << 24))


def load() -> None:
    """Everything before the socket listens; may not return."""
    starts = 1
    if count := ENV.get("FAKE_VLLM_COUNT"):
        with Path(count).open("a") as file:
            file.write(f"{os.getpid()}\n")
        starts = len(Path(count).read_text().split())
    if size := int(ENV.get("FAKE_VLLM_CHATTER", 0)):
        for stream in (sys.stdout, sys.stderr):
            stream.write(("chatter " * 16 + "\n") * (size // 129 + 1))
            stream.flush()
    for stream in (sys.stdout, sys.stderr):
        print(said(), file=stream, flush=True)
    if text := ENV.get("FAKE_VLLM_STDERR"):
        print(text, file=sys.stderr, flush=True)
    if (status := ENV.get("FAKE_VLLM_EXIT")) and starts <= int(ENV.get("FAKE_VLLM_EXIT_FIRST", 1_000_000)):
        sys.exit(int(status))
    if ENV.get("FAKE_VLLM_CORE") == "1":
        globals()["CORE"] = fork_core()
    elif ENV.get("FAKE_VLLM_SHM") == "1":
        globals()["_shm"] = make_shm()
    until = time.monotonic() + float(ENV.get("FAKE_VLLM_START_SECONDS", 0))
    while (left := until - time.monotonic()) > 0:
        if ENV.get("FAKE_VLLM_START_SILENT") != "1":
            say("Loading safetensors checkpoint shards")
            time.sleep(min(0.1, left))
        else:
            time.sleep(left)


def main() -> None:
    args = sys.argv[1:]
    lacking = {*ENV.get("FAKE_VLLM_LACKS", "").split()}
    if any(a.startswith("--help") for a in args):
        print("\n".join(line for line in HELP.splitlines() if not lacking & {*re.findall(r"--[a-z-]+", line)}))
        return
    if args[:1] != ["serve"] or "--uds" not in args:
        sys.exit("fake_vllm: serve DIR --uds PATH")
    known = {*re.findall(r"--[a-z-]+", HELP)} - lacking
    if unknown := [a for a in args if a.startswith("--") and a.partition("=")[0] not in known]:
        print(f"vllm: error: unrecognized arguments: {' '.join(unknown)}", file=sys.stderr, flush=True)
        sys.exit(2)
    uds = args[args.index("--uds") + 1]
    if ENV.get("FAKE_VLLM_START_IGNORES_TERM") == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"vLLM API server, non-default args: {args[1:]}")
    load()
    name = args[args.index("--served-model-name") + 1] if "--served-model-name" in args else args[1]
    Handler.model, Handler.engine = name, Engine()
    server = Server(uds, Handler)  # a stale socket: OSError, Address already in use, as with the real one
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    say("Application startup complete.")
    while not stop.wait(0.05):
        pass
    Handler.engine.draining = True
    # As the real one does when its processes end in an unlucky order.
    print("(APIServer pid=1) ERROR 01-01 00:00:00 [async_llm.py:906] AsyncLLM output_handler failed.", flush=True)
    patience = float(args[args.index("--shutdown-timeout") + 1]) if "--shutdown-timeout" in args else 0.0
    until = time.monotonic() + patience
    while Handler.engine.running and time.monotonic() < until:
        time.sleep(0.02)
    with contextlib.suppress(OSError):
        Path(uds).unlink()
    say("Application shutdown complete.")
    os._exit(0)


if __name__ == "__main__":
    main()
