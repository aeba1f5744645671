"""The application that answers over HTTP, and the server around it.

POST /v1/recommend       {"history": [...], "num_beams": 10, "count": 10}: the items that come next
GET  /v1/items?prefix=   names of items and their Semantic IDs
GET  /v1/about           the engine, the model, the limits, and a history to try
GET  /health             200 when requests are answered, 503 before
GET  /metrics            for Prometheus
GET  /                   the page
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from .. import _checks
from .._inputs import shown
from .._version import __version__
from .engine import Engine, Search
from .metrics import Metrics
from .questions import Items, Question, Refused
from .worker import NotReady, QueueFull, Worker, WorkerError

MOST_BYTES = 1 << 20  # of a body
MOST_NAMES = 100  # of an answer of /v1/items
BEAMS = 10  # where a request says nothing
_RETRY_SECONDS = 2
_PAGE = {
    "": ("index.html", "text/html"),
    "page/script.js": ("script.js", "text/javascript"),
    "page/style.css": ("style.css", "text/css"),
}
_OWN_FILES_ALONE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def make_app(items: Items, factory: Callable[[], Engine], *, deadline: float = 30.0, **options: Any) -> FastAPI:
    """The application; its worker starts and ends with it, and is `app.state.worker`.

    Args:
        items: of the catalogue that the engine searches.
        factory: of `Worker`.
        deadline: seconds from a request to its answer; 504 after them.
        options: further ones of `Worker`.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    if not 0 < deadline < math.inf:
        raise ValueError(f"deadline = {deadline}; give a number of seconds above 0")
    metrics = Metrics()
    worker = Worker(factory, on_batch=metrics.batch, **options)
    metrics.watch(lambda: worker.waiting, lambda: worker.state == "ready", lambda: worker.restarts)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="prefixmem serve", version=__version__, lifespan=lifespan, openapi_url=None)
    app.state.worker = worker
    app.add_exception_handler(HTTPException, _refuse_address)
    app.add_exception_handler(Exception, _own_fault)

    @app.post("/v1/recommend")
    async def recommend(http: HTTPRequest) -> Response:
        began, outcome = time.monotonic(), "failed"
        try:
            response, outcome = await _recommend(http, items, worker, deadline)
        finally:
            metrics.request(outcome, time.monotonic() - began)
        return response

    @app.get("/v1/items")
    async def names(http: HTTPRequest) -> Response:
        asked = http.query_params
        most = asked.get("limit", "20")
        if not (most.isascii() and most.isdigit() and len(most) < 5 and 1 <= int(most) <= MOST_NAMES):
            return _error(422, f"limit = {shown(most)}; allowed are 1..{MOST_NAMES}")
        return _json(200, {"items": items.beginning_with(asked.get("prefix", ""), int(most))})

    @app.get("/v1/about")
    async def about() -> Response:
        if worker.about is None:
            return _error(503, "the engine is starting; GET /health says when it is ready", _RETRY_SECONDS)
        limits = {**worker.about["limits"], "body_bytes": MOST_BYTES, "deadline_seconds": deadline}
        return _json(200, {**worker.about, "limits": limits, "example": items.example()})

    @app.get("/health")
    async def health() -> Response:
        ready = worker.state == "ready"
        headers = {} if ready else {"Retry-After": str(_RETRY_SECONDS)}
        return _json(200 if ready else 503, {"status": worker.state, "restarts": worker.restarts}, headers)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for address, (name, kind) in _PAGE.items():
        content = files(__package__).joinpath("page", name).read_bytes()
        app.add_route(f"/{address}", partial(_file, content, kind))
    return app


async def _recommend(http: HTTPRequest, items: Items, worker: Worker, deadline: float) -> tuple[Response, str]:
    """The response, and its outcome for metrics."""
    ends = time.monotonic() + deadline
    try:
        body = await _read_body(http, deadline)
        if worker.about is None:
            raise NotReady("the engine is starting; try again, GET /health says when it is ready")
        limits = worker.about["limits"]
        question = items.read(body, limits, min(BEAMS, limits["max_beams"]))
        search = await _answer(http, worker, question, ends)
    except Refused as error:
        return _error(error.status, str(error)), "refused"
    except asyncio.TimeoutError:
        return _error(504, f"no answer within {deadline:g} s (--deadline); send it again later"), "too_late"
    except ClientDisconnect:
        return Response(status_code=499), "client_gone"
    except WorkerError as error:
        wait = 1 if isinstance(error, QueueFull) else _RETRY_SECONDS
        if error.outcome == "engine_failed":
            return _error(500, str(error)), error.outcome
        return _error(503, str(error), wait), error.outcome
    return _json(200, as_json(search, question.count)), "answered"


async def _read_body(http: HTTPRequest, seconds: float) -> bytes:
    """The body.

    Raises:
        Refused: it is larger than allowed, and the rest is not read; or it takes too long to come.
    """

    async def read() -> bytes:
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(413, f"the body has more than {MOST_BYTES} bytes, the limit; send a shorter history")
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body has not come within {seconds:g} s (--deadline); send it at once") from None


async def _answer(http: HTTPRequest, worker: Worker, question: Question, ends: float) -> Search:
    """Wait for a search; a client that goes away, and a deadline, take it out of the queue.

    Raises:
        WorkerError, TimeoutError, ClientDisconnect: there is no answer.
    """
    answer = asyncio.wrap_future(worker.submit(question.request))
    gone = asyncio.ensure_future(http.receive())  # after the body only the client's end is received
    try:
        left = max(ends - time.monotonic(), 0)
        await asyncio.wait((answer, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise ClientDisconnect
        raise asyncio.TimeoutError
    finally:
        for task in (answer, gone):
            task.cancel()


def as_json(search: Search, count: int) -> dict[str, Any]:
    """A search as it is sent: Semantic IDs as lists of codes, probabilities as natural logarithms and as they are."""
    return {
        "items": [
            {"names": list(found.names), "sid": list(found.codes), **_probability(found.logprob)}
            for found in search.items[:count]
        ],
        "beams": [
            [{"prefix": list(beam.codes), **_probability(beam.logprob)} for beam in level] for level in search.beams
        ],
    }


def _probability(logprob: float) -> dict[str, float]:
    return {"logprob": logprob, "probability": math.exp(min(logprob, 0.0))}


def _json(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, allow_nan=False)  # in ASCII: a name may hold what UTF-8 has no bytes for
    return Response(text, status, headers, "application/json")


def _error(status: int, text: str, retry: int | None = None) -> Response:
    return _json(status, {"error": text}, {} if retry is None else {"Retry-After": str(retry)})


async def _refuse_address(http: HTTPRequest, error: HTTPException) -> Response:
    text = f"{http.method} {shown(http.url.path)}: {error.detail}; GET / is the page, POST /v1/recommend recommends"
    return _json(error.status_code, {"error": text}, dict(error.headers or {}))


async def _own_fault(http: HTTPRequest, error: Exception) -> Response:
    return _error(500, f"the server failed ({type(error).__name__}), which is its own fault; its log has the rest")


async def _file(content: bytes, kind: str, http: HTTPRequest) -> Response:
    return Response(content, headers=_OWN_FILES_ALONE, media_type=f"{kind}; charset=utf-8")


def bound(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: the address cannot be had.
    """
    if not 0 <= _checks.integer("port", port) < 1 << 16:
        raise ValueError(f"port = {port}; allowed are 0..65535, 0 for any that is free")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if (error.errno or 0) > 0 else error.strerror or error
        raise ValueError(
            f"host = {host!r}, port = {port}: {reason}; give another, or port 0 for any free one"
        ) from None


def serve(app: FastAPI, listening: socket.socket, on_ready: Callable[[str], object], deadline: float = 30.0) -> None:
    """Answer until SIGTERM or SIGINT; what is in flight then is finished.

    Args:
        app: of `make_app`.
        on_ready: told the address once the engine is loaded for the first time.
        deadline: of `make_app`; how long the end may take.

    Raises:
        ValueError: the engine cannot be loaded.
    """
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    worker: Worker = app.state.worker
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            timeout_graceful_shutdown=math.ceil(deadline) + 5,
        )
    )

    def stop(*_: object) -> None:
        server.should_exit = True

    told = False

    def ready() -> None:
        nonlocal told
        if not told:
            told = True
            with suppress(OSError, ValueError):  # nobody listens
                on_ready(address)

    worker.on_ready, worker.on_failed = ready, stop
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # uvicorn raises a signal once more at its end, which then meets `stop`.
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        with suppress(OSError):
            listening.close()
    if worker.failure is not None:
        raise ValueError(worker.failure)
