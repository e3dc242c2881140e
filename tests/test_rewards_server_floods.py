"""A reward server under strangers and under clients that mean no good: what it takes is bounded, and it goes on
serving.

The server is a process of its own, ``vipo serve-reward``, so that its memory, threads and processor time can be read.
"""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from PIL import Image

from vipo.connections import CONNECTIONS
from vipo.rewards import wire
from vipo.rewards.remote import Remote
from vipo.types import Prompt

TOKEN = "s3cret-of-the-floods"
MEGABYTES = 64  # longest request; so at most 16 million pixels
PROMPTS = [Prompt("a", 0), Prompt("b", 1)]
MEDIA = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Process:
    """A served reward and what the kernel says about it."""

    pid: int
    port: int

    def status(self, field: str) -> int:
        """A number of /proc/PID/status; sizes are in kB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def grown(self, before_kb: int) -> float:
        """Megabytes at the peak, over what it had."""
        return (self.status("VmHWM") - before_kb) / 1000

    def serves(self, **options: float) -> bool:
        remote = Remote(url=f"http://127.0.0.1:{self.port}", token_env="FLOODED", **options)
        return bool(remote(MEDIA, PROMPTS).isfinite().all())

    def post(self, body: bytes, **headers: str) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
        try:
            connection.request("POST", "/score", body, given)
            return connection.getresponse().status
        finally:
            connection.close()

    def send(self, content: bytes) -> socket.socket:
        """A connection that stays open."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(content)
        return connection


@contextmanager
def process(most_files: int | None = None) -> Iterator[Process]:
    def limit() -> None:
        if most_files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))

    words = ["serve-reward", "redness", "--port", "0", "--token-env", "FLOODED", "--max-megabytes", str(MEGABYTES)]
    environment = {**os.environ, "FLOODED": TOKEN}
    server = subprocess.Popen(
        [sys.executable, "-m", "vipo", *words], stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=limit
    )
    try:
        said = server.stdout.readline()
        yield Process(server.pid, int(said.strip().rpartition(":")[2]))
        assert server.poll() is None, "the server has ended"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOODED", TOKEN)


@pytest.fixture(scope="module")
def flooded() -> Iterator[Process]:
    with process() as server:
        yield server


def png(side: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def request(pictures: list[str]) -> bytes:
    items = [{"id": str(k), "prompt": "", "media": {"kind": "png", "data": data}} for k, data in enumerate(pictures)]
    return json.dumps({"version": wire.VERSION, "items": items}).encode()


def head(length: int, token: str = TOKEN) -> bytes:
    lines = f"POST /score HTTP/1.0\r\nContent-Type: application/json\r\nAuthorization: Bearer {token}\r\n"
    return f"{lines}Content-Length: {length}\r\n\r\n".encode()


def test_pixels_are_counted_before_they_are_decoded(flooded: Process) -> None:
    assert flooded.serves()
    before = flooded.status("VmHWM")
    large = png(8000)  # 64 million pixels, 0.8 GB as float32, in 190 kB
    assert len(request([large] * 8)) < 2_500_000
    assert flooded.post(request([large] * 8)) == 413
    assert flooded.post(request([png(2000)] * 8)) == 413  # each of them is taken, all of them are not
    assert flooded.grown(before) < 150
    assert flooded.post(request([png(2000)] * 2)) == 200
    assert flooded.grown(before) < 400


def test_json_of_many_values_is_refused_before_it_is_parsed(flooded: Process) -> None:
    before = flooded.status("VmHWM")
    assert flooded.post(b'{"version":1,"items":[' + b"[]," * 10_000_000 + b"[]]}") == 413
    assert flooded.post(b"[" * 900_000) == 400
    assert flooded.grown(before) < 200  # the text itself, read and joined; as lists it would be 700


def test_slow_senders_with_the_token_give_way(flooded: Process) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(flooded.send(head(50_000_000) + b"{"))
        begin = time.monotonic()
        assert flooded.serves(retries=0)
        assert time.monotonic() - begin < 20


def test_two_hundred_at_once(flooded: Process) -> None:
    honest = wire.encode_request(MEDIA, PROMPTS, encoding="exact")
    codes: Counter[int | str] = Counter()
    threads_before, before = flooded.status("Threads"), flooded.status("VmHWM")
    most_threads, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most_threads[0] = max(most_threads[0], flooded.status("Threads"))

    def client(number: int) -> None:
        what = number % 5
        try:
            if what == 0:
                codes[flooded.post(honest)] += 1
            elif what == 1:
                codes[flooded.post(honest, Authorization="Bearer wrong")] += 1
            elif what == 2:
                codes[flooded.post(b"", **{"Content-Length": str(10**12)})] += 1
            elif what == 3:
                codes[flooded.post(b"\x00garbage")] += 1
            else:  # says nothing, or says headers without end
                with flooded.send(b"" if number % 2 else b"GET / HTTP/1.0\r\n" + b"X: y\r\n" * 90) as connection:
                    done.wait(20)
                    codes["hung up on" if connection.recv(1) == b"" else "answered"] += 1
        except OSError as error:
            codes[type(error).__name__] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(200)]
    watching = threading.Thread(target=watch)
    watching.start()
    for thread in clients:
        thread.start()
    for number, thread in enumerate(clients):
        if number % 5 < 4:
            thread.join(60)
    assert flooded.serves()
    done.set()
    for thread in [*clients, watching]:
        thread.join(60)
    assert most_threads[0] <= threads_before + CONNECTIONS + 2
    assert flooded.grown(before) < 200
    assert set(codes) <= {200, 400, 401, 413, 503, "hung up on", "ConnectionResetError", "BrokenPipeError"}, codes
    assert codes[200] >= 30 and codes[401] >= 30 and codes[413] >= 30, codes
    assert flooded.serves(retries=0)


def test_without_descriptors_it_neither_spins_nor_stays_deaf() -> None:
    with process(most_files=48) as server, ExitStack() as stack:
        assert server.serves()
        for _ in range(60):
            stack.enter_context(server.send(b"POST"))
        before, begin = server.cpu_seconds(), time.monotonic()
        time.sleep(3)
        assert (server.cpu_seconds() - before) / (time.monotonic() - begin) < 0.3
        assert server.serves(connect_seconds=60)
