"""What goes wrong between a client and an HTTP server: errors, cuts, latency, silence, a server that is down."""

import math
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from random import Random
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from servers import free_port

PIECE = 1 << 16  # bytes
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BUSY_HEAD = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n" % len(BUSY)


class Faults(NamedTuple):
    """What goes wrong from the next request on; nothing by default."""

    errors: float = 0.0  # share of the requests that are answered 503
    cuts: float = 0.0  # share of the other GETs whose connection is reset amid a body of stated length
    latency: float = 0.0  # seconds before a request is answered or passed on
    rate: float = math.inf  # bytes per second of each answer
    silent: bool = False  # requests are taken and never answered


@dataclass
class Counts:
    """What has happened so far."""

    requests: Counter[str] = field(default_factory=Counter)  # by method
    errors: int = 0  # requests answered 503
    cuts: int = 0  # connections reset amid a body
    sent: int = 0  # bytes of the bodies passed on to clients, with the framing of chunks


class FaultProxy:
    """Stands before an HTTP server; each request meets what `faults` says at that moment, chosen by seed and number.

    What is passed on is not changed, so signatures, which include the host's name as the client says it, hold.
    """

    def __init__(self, server: str, *, seed: int = 0, listener: socket.socket | None = None) -> None:
        """Nothing listens yet.

        Args:
            listener: a socket that is bound already; by default one on a free port of 127.0.0.1.
        """
        self.server = (urlsplit(server).hostname, urlsplit(server).port)
        self.faults, self.counts = Faults(), Counts()
        self.random, self.lock = Random(seed), threading.Lock()
        self.connections: set[socket.socket] = set()
        self.recovery: threading.Timer | None = None
        self.listener = listener or socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # it listens anew when it was down
        if listener is None:
            self.listener.bind(("127.0.0.1", free_port()))
        address, port = self.listener.getsockname()
        self.url = f"http://{address}:{port}"
        os.register_at_fork(after_in_child=self.let_go)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self.listener.close()

    def up(self) -> None:
        self.listener.listen(128)
        self.accepting = threading.Thread(target=self.accept, daemon=True)
        self.accepting.start()

    def down(self, seconds: float = math.inf) -> None:
        """End all connections and refuse new ones, for so long; returns at once."""
        if self.recovery:
            self.recovery.cancel()
            self.recovery.join()
        with suppress(OSError):  # down already
            self.listener.shutdown(socket.SHUT_RDWR)
        self.accepting.join()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):  # the other side was faster
                    connection.shutdown(socket.SHUT_RDWR)  # its thread wakes and closes it
        if seconds < math.inf:
            self.recovery = threading.Timer(seconds, self.up)
            self.recovery.start()

    def let_go(self) -> None:
        """Close the copies that a forked process has; with them, nothing that is closed here would be closed."""
        for connection in (self.listener, *self.connections):
            with suppress(OSError):
                os.close(connection.detach())

    def accept(self) -> None:
        """Give each connection a thread, until the proxy goes down."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                self.connections.add(connection)
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    @contextmanager
    def known(self, connection: socket.socket) -> Iterator[socket.socket]:
        """Let `down` find a connection until the block ends, and it with it."""
        with self.lock:
            self.connections.add(connection)
        try:
            with connection:
                yield connection
        finally:
            with self.lock:
                self.connections.discard(connection)

    def serve(self, client: socket.socket) -> None:
        """Answer the requests of a connection, one after the other."""
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.known(client), client.makefile("rb") as requests:
            try:
                while self.answer(client, requests):
                    pass
            except OSError:  # of the client or of the server: both have lost the other
                reset(client)

    def answer(self, client: socket.socket, requests: BufferedReader) -> bool:
        """Read a request and let it meet its fate; whether the connection may bring another."""
        request, fields = head(requests)
        if not request:
            return False
        method, version = request.split()[0].decode(), request.split(b"\r\n")[0].split()[-1]
        if "expect" in fields:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        request += b"".join(body(requests, fields, unstated=0))
        with self.lock:
            faults = self.faults
            error, cut, share = (self.random.random() for _ in range(3))  # always three: no fate depends on another
            self.counts.requests[method] += 1
        if faults.silent:
            while client.recv(PIECE):
                pass
            return False
        time.sleep(faults.latency)
        if error < faults.errors:
            with self.lock:
                self.counts.errors += 1
            client.sendall(BUSY_HEAD if method == "HEAD" else BUSY_HEAD + BUSY)
            goes_on = True
        else:
            cut_after = share if method == "GET" and cut < faults.cuts else 1.0
            goes_on = self.pass_on(request, method, client, cut_after, faults.rate)
        return goes_on and version == b"HTTP/1.1" and fields.get("connection", "").lower() != "close"

    def pass_on(self, request: bytes, method: str, client: socket.socket, share: float, rate: float) -> bool:
        """Send the server's answer on, as fast as the rate allows; below 1, only this share of its body.

        Every request has a connection of its own to the server: none can have grown old.
        """
        with self.known(socket.create_connection(self.server)) as server, server.makefile("rb") as answers:
            server.sendall(request)
            answer, fields = head(answers)
            while answer.startswith(b"HTTP/1.1 100"):  # sent on already
                answer, fields = head(answers)
            if not answer:
                raise ConnectionResetError("the server has gone")
            client.sendall(answer)
            if method == "HEAD" or answer.split()[1] in (b"204", b"304"):
                return fields.get("connection", "").lower() != "close"
            length = int(fields.get("content-length", 0))
            end = int(share * length) if share < 1 and length else math.inf
            sent, began = 0, time.monotonic()
            for piece in body(answers, fields, unstated=math.inf):
                part = piece[: int(min(end - sent, len(piece)))]
                sent += len(part)
                time.sleep(max(0.0, began + sent / rate - time.monotonic()))
                with self.lock:
                    self.counts.sent += len(part)
                    self.counts.cuts += sent == end
                client.sendall(part)
                if sent == end:
                    raise ConnectionResetError("as it should be")
            stated = {"content-length", "transfer-encoding"} & set(fields)
            return bool(stated) and fields.get("connection", "").lower() != "close"


def reset(connection: socket.socket) -> None:
    """Have the other side see a reset, not an end, when this one closes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def head(file: BufferedReader) -> tuple[bytes, dict[str, str]]:
    """A request's or an answer's head as it stands, and its fields by lower-case name; nothing if there is no more."""
    if not file.peek(1):
        return b"", {}
    raw, fields = whole_line(file), {}
    while (line := whole_line(file)) != b"\r\n":
        name, _, value = line.decode("latin-1").partition(":")
        fields[name.lower()] = value.strip()
        raw += line
    return raw + line, fields


def body(file: BufferedReader, fields: dict[str, str], *, unstated: float) -> Iterator[bytes]:
    """A body as it stands, in pieces: by chunks or by its length, which is inf up to the end of the stream."""
    if fields.get("transfer-encoding", "").lower() == "chunked":
        while size := int((line := whole_line(file)).partition(b";")[0], 16):
            yield line
            yield from stretch(file, size + 2)
        yield line
        while (line := whole_line(file)) != b"\r\n":
            yield line
        yield line
    else:
        yield from stretch(file, float(fields.get("content-length", unstated)))


def stretch(file: BufferedReader, size: float) -> Iterator[bytes]:
    while size:
        piece = file.read1(int(min(size, PIECE)))
        if not piece and size < math.inf:
            raise ConnectionResetError("the stream ends within a body")
        if not piece:
            return
        yield piece
        size -= len(piece)


def whole_line(file: BufferedReader) -> bytes:
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the stream ends within a line")
    return line
