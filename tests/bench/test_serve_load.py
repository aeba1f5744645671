"""The load script counts what a server does wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bench import serve_load

ITEMS = [{"names": [name], "sid": [i], "logprob": -1.0 - i} for i, name in enumerate("abc")]


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        (kind,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["history"]
        if kind == "lost":
            self.close_connection = True
            return
        items = {"swapped": [ITEMS[1], ITEMS[0], ITEMS[2]], "short": ITEMS[:2]}.get(kind, ITEMS)
        content = json.dumps({"items": items}).encode()
        self.send_response(503 if kind == "refused" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_request_is_counted_once(address):
    kinds = ["right", "right", "swapped", "short", "refused", "lost"]
    load = serve_load.send(address, [{"history": [kind]} for kind in kinds], [ITEMS] * 6, 60, 4)
    assert load.outcomes == {"right": 20, "wrong": 20, "503": 10, "lost": 10}
    assert len(load.seconds) == 40
    row = serve_load.row_of(load, {"requests": 60})
    assert row["p20"] <= row["p50"] <= row["p99"]
    assert row["requests_per_second"] > 0


def test_rankings():
    """Items whose scores tie may change places, and nothing else may."""

    def ranking(*entries):
        return [{"names": [name], "sid": [sid], "logprob": logprob} for name, sid, logprob in entries]

    known = ranking(("a", 1, -1.0), ("b", 2, -2.0), ("c", 3, -2.0001))
    assert serve_load.same(known, known)
    assert serve_load.same(ranking(("a", 1, -1.0), ("c", 3, -2.0), ("b", 2, -2.0001)), known)
    assert serve_load.same(ranking(("a", 1, -1.0), ("b", 2, -2.0), ("d", 4, -2.0003)), known)
    for wrong in (
        ranking(("b", 2, -1.0), ("a", 1, -2.0), ("c", 3, -2.0001)),
        ranking(("x", 1, -1.0), ("b", 2, -2.0), ("c", 3, -2.0001)),
        ranking(("d", 4, -1.0), ("b", 2, -2.0), ("c", 3, -2.0001)),
        ranking(("a", 1, -1.0), ("b", 2, -2.0)),
        ranking(("a", 1, -1.1), ("b", 2, -2.0), ("c", 3, -2.0001)),
    ):
        assert not serve_load.same(wrong, known)
