"""A real S3 server for tests (moto's), and between it and the client a proxy that breaks the network as planned.

A plan is a list of rules; a rule is a fault, a number of times, and the requests it is for. Requests are passed on one
at a time, because the server behind checks a condition and writes in two steps that threads could interleave, while S3
does both at once. Nothing here knows what is under test: what the client sees are bytes on a socket.
"""

import logging
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

SLOW_DOWN = "slow_down"
"""503 with S3's SlowDown; the request is not passed on."""
RESET = "reset"
"""The connection breaks before the request is passed on."""
LOST_ANSWER = "lost_answer"
"""The request is passed on and done, then the connection breaks."""
TRUNCATE = "truncate"
"""Half of the answer's body comes, then the connection closes."""
SHORTEN = "shorten"
"""Half of the answer's body comes, with a Content-Length that agrees with it."""
FLIP = "flip"
"""One bit of the answer's body is wrong."""
HANG = "hang"
"""Nothing comes for longer than the client waits."""
WRONG_CLOCK = "wrong_clock"
"""403 RequestTimeTooSkewed with a Date of three hours ago."""
CONFLICT = "conflict"
"""409 ConditionalRequestConflict."""
NOT_FOUND = "not_found"
"""404 of a proxy before the server that knows no such route: its own words, no XML; the request is not passed on."""
UNCONDITIONAL = "unconditional"
"""The request is passed on without its conditions, as by a server that does not know them."""
CONDITIONS = ("if-none-match", "if-match")
HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "date", "server", "keep-alive")
SKEW_S = 3 * 3600


@dataclass
class Rule:
    """A fault for the next `times` requests whose "METHOD path?query" the pattern is found in."""

    fault: str
    times: int = 1
    pattern: str = ""
    chance: float = 1.0


@dataclass
class Network:
    """What the proxy does; `seen` are the requests that arrived, `struck` the faults that were injected."""

    url: str = ""
    rules: list[Rule] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    hang_s: float = 3.0
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    lock: threading.Lock = field(default_factory=threading.Lock)
    before_passing_on: Callable[[str], None] | None = None

    def plan(self, *rules: Rule, seed: int = 0) -> None:
        """Begin anew with these rules; chances are drawn from the seed."""
        with self.lock:
            self.rules, self.seen, self.struck = list(rules), [], []
            self.draw = random.Random(seed)

    def next_fault(self, request: str) -> str | None:
        with self.lock:
            self.seen.append(request)
            for rule in self.rules:
                if rule.times > 0 and re.search(rule.pattern, request) and self.draw.random() < rule.chance:
                    rule.times -= 1
                    self.struck.append(rule.fault)
                    return rule.fault
        return None


@contextmanager
def s3_server() -> Iterator[Network]:
    """A server with a proxy before it, in threads of this process; `Network.url` is what AWS_ENDPOINT_URL should be."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    behind = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    network = Network()
    handler = type("Handler", (_Handler,), {"network": network, "behind": behind.get_host_and_port(), "one": _one()})
    front = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    network.url = f"http://127.0.0.1:{front.server_address[1]}"
    try:
        yield network
    finally:
        front.shutdown()
        front.server_close()
        thread.join()
        behind.stop()


def _one() -> threading.Lock:
    return threading.Lock()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    network: Network
    behind: tuple[str, int]
    one: threading.Lock

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        request = f"{self.command} {self.path}"
        fault = self.network.next_fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return  # the client went away in the middle of an upload
        if fault == SLOW_DOWN:
            self._error(503, "SlowDown", "Please reduce your request rate.")
        elif fault == CONFLICT:
            self._error(409, "ConditionalRequestConflict", "A conflicting conditional operation is in progress.")
        elif fault == WRONG_CLOCK:
            self._error(403, "RequestTimeTooSkewed", "The difference between the request time and the current time is")
        elif fault == NOT_FOUND:
            content = b"default backend - 404"
            self._head(404, [("Content-Type", "text/plain"), ("Content-Length", str(len(content)))], time.time())
            self.wfile.write(content if self.command != "HEAD" else b"")
        elif fault == RESET:
            self._break()
        elif fault == HANG:
            time.sleep(self.network.hang_s)
            self._break()
        else:
            if self.network.before_passing_on is not None:
                self.network.before_passing_on(request)
            with self.one:
                status, headers, content = self._pass_on(body, without=CONDITIONS if fault == UNCONDITIONAL else ())
            if fault == LOST_ANSWER:
                self._break()
            else:
                self._send(status, headers, content, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    def _pass_on(self, body: bytes, without: tuple[str, ...]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = HTTPConnection(*self.behind, timeout=60)
        try:
            left_out = ("expect", "connection", *without)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
            connection.request(self.command, self.path, body, headers)
            answer: HTTPResponse = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str | None) -> None:
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
        sent = content
        if fault in (TRUNCATE, SHORTEN):
            sent = content[: len(content) // 2]
        if fault == SHORTEN:
            length = str(len(sent))
        if fault == FLIP and content:
            sent = bytes([content[0] ^ 1]) + content[1:]
        self._head(status, [*headers, ("Content-Length", length)], time.time())
        self.wfile.write(sent)
        if fault == TRUNCATE:
            self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        skewed = time.time() - SKEW_S if code == "RequestTimeTooSkewed" else time.time()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
        self._head(status, headers, skewed)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: list[tuple[str, str]], now: float) -> None:
        self.send_response_only(status)
        self.send_header("Date", formatdate(now, usegmt=True))
        seen_length = False
        for name, value in reversed(headers):
            if name.lower() == "content-length":
                if seen_length:
                    continue
                seen_length = True
            elif name.lower() in HOP_HEADERS:
                continue
            self.send_header(name, value)
        self.end_headers()

    def _break(self) -> None:
        """Close with a reset, so that the client sees a broken connection and not an end."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
