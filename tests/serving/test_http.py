"""The application: answers, limits, every error in one line of JSON, metrics, and clients that go away."""

import asyncio
import json
import re
import time
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixmem_fast.serving import http as module
from prefixmem_fast.serving.http import make_app
from prefixmem_fast.serving.questions import Items
from tests.helpers.models import vocabulary
from tests.serving import engines
from tests.serving.folders import write_index

WAIT, DIE, FAIL = "item 0", "item 2", "item 3"


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    vocabulary().save_pretrained(folder)
    return Items(folder, write_index(folder / "items.json"))


def ready(get):
    """Ask until the engine is there."""
    end = time.monotonic() + 60
    while get("/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def client_of(items, folder, **options):
    app = make_app(items, partial(engines.says, str(folder)), **options)
    with TestClient(app, raise_server_exceptions=False) as client:
        ready(client.get)
        yield client


@pytest.fixture(scope="module")
def client(items, tmp_path_factory):
    with client_of(items, engines.pipes(tmp_path_factory.mktemp("pipes"))) as client:
        yield client


def recommend(client, *history, **more):
    return client.post("/v1/recommend", json={"history": list(history), **more})


def said(response):
    """The line of an error."""
    assert response.headers["content-type"] == "application/json"
    (line,) = response.json().values()
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def counts(client):
    lines = re.findall(r'prefixmem_requests_total\{outcome="(\w+)"\} (\d+)', client.get("/metrics").text)
    return {outcome: int(count) for outcome, count in lines if int(count)}


def test_an_answer(client):
    answer = recommend(client, "item 1", [3, 4, 5], num_beams=3, count=2).json()
    assert [found["sid"] for found in answer["items"]] == [[3, 4, 5]] * 2
    assert answer["items"][1] == {
        "names": ["number 1", "\ud800<b>"],
        "sid": [3, 4, 5],
        "logprob": -2.5,
        "probability": pytest.approx(0.0820849986),
    }
    assert [level[0]["prefix"] for level in answer["beams"]] == [[3], [3, 4], [3, 4, 5]]
    assert len(recommend(client, "item 1").json()["items"]) == 7, "10 unless fewer are allowed"


def test_names_for_a_search_box(client):
    found = client.get("/v1/items", params={"prefix": "ITEM 1"}).json()["items"]
    assert found == [{"name": "item 1", "sid": [0, 1, 5]}]
    assert len(client.get("/v1/items").json()["items"]) == 8
    assert [one["name"] for one in client.get("/v1/items?prefix=item&limit=2").json()["items"]] == ["item 0", "item 1"]
    assert client.get("/v1/items?prefix=x").json() == {"items": []}
    for limit in ("0", "101", "-1", "1e1", "²", "9" * 5000):
        response = client.get("/v1/items", params={"limit": limit})
        assert response.status_code == 422
        assert said(response).endswith("; allowed are 1..100")


def test_what_it_says_of_itself(client):
    about = client.get("/v1/about").json()
    assert about["engine"] == "says"
    assert about["limits"] == {**engines.LIMITS, "body_bytes": 1 << 20, "deadline_seconds": 30.0}
    assert [item["sid"][0] for item in about["example"]] == [1, 1, 1]


BODIES = [
    (400, b"", "the body is not JSON"),
    (400, b"{", "the body is not JSON (Expecting property name"),
    (400, b"\xff\xfe", "the body is not JSON (not UTF-8)"),
    (400, b"[" * 100_000, "the body is not JSON (nested too deeply)"),
    (400, b'{"history": [NaN]}', "NaN is no number of JSON"),
    (400, b"1" * 5000, "the body is not JSON"),
    (400, b"[]", 'the body is []; send an object, {"history": ["item", ...]}'),
    (422, b"{}", "history is missing"),
    (422, {"history": ["item 1"], "beams": 3}, "'beams' is no argument; allowed are history, num_beams, count"),
    (422, {"history": "item 1"}, "history = 'item 1' is no list"),
    (422, {"history": []}, "history has 0 items; this model needs 1 or more"),
    (422, {"history": ["item 1"] * 6}, "history has 6 items; allowed are 5 at most: send the last 5"),
    (422, {"history": [1]}, "history[0] = 1; send the name of an item, or a list of codes"),
    (422, {"history": ["item 1", None]}, "history[1] = None; send the name"),
    (422, {"history": ["item 1", [0, 1]]}, "history[1] = [0, 1]; send 3 whole numbers, a code of each level"),
    (422, {"history": [[0, 1, True]]}, "send 3 whole numbers"),
    (422, {"history": [[0, 1.0, 1]]}, "send 3 whole numbers"),
    (422, {"history": [[0, 5, 1]]}, "history[0] = [0, 5, 1]: level 2 allows 0..4"),
    (422, {"history": [[0, -1, 1]]}, "level 2 allows 0..4"),
    (422, {"history": [[0, 10**30, 1]]}, "level 2 allows 0..4"),
    (422, {"history": [[2, 0, 0]]}, "has a code that the model has no token for"),
    (422, {"history": ["a", "item 1", "b"]}, "items that the catalogue does not: 'a', 'b'; GET /v1/items?prefix="),
    (422, b'{"history": ["\\ud800\\n"]}', r"'\ud800\n'; GET"),
    (422, {"history": ["item 1"], "num_beams": 8}, "num_beams = 8; allowed are 1..7"),
    (422, {"history": ["item 1"], "num_beams": 0}, "num_beams = 0; allowed are 1..7"),
    (422, {"history": ["item 1"], "num_beams": True}, "num_beams = True; send a whole number"),
    (422, {"history": ["item 1"], "num_beams": 10**40}, "is too large"),
    (422, {"history": ["item 1"], "num_beams": 2, "count": 3}, "count = 3; allowed are 1..2"),
    (422, {"history": ["item 1"], "count": "2"}, "count = '2'; send a whole number"),
]


@pytest.mark.parametrize(("status", "body", "text"), BODIES, ids=range(len(BODIES)))
def test_questions_that_are_refused(client, status, body, text):
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post("/v1/recommend", content=content)
    assert response.status_code == status
    assert text in said(response)


def test_unknown_items_are_named_but_not_all_of_a_thousand(items):
    limits = {**engines.LIMITS, "max_history": 5000}
    body = json.dumps({"history": [f"thing {i}" * 100 for i in range(1000)]}).encode()
    with pytest.raises(module.Refused, match="and 995 more; GET") as error:
        items.read(body, limits, 2)
    assert len(str(error.value)) < 1000


def test_a_body_that_is_too_large(client):
    response = client.post("/v1/recommend", content=b" " * (1 << 20))
    assert response.status_code == 400
    response = client.post("/v1/recommend", content=b" " * ((1 << 20) + 1))
    assert response.status_code == 413
    assert said(response) == "the body has more than 1048576 bytes, the limit; send a shorter history"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["item 1", "item 5"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
QUESTIONS = st.fixed_dictionaries({}, optional=dict.fromkeys(("history", "num_beams", "count"), VALUES))


@settings(max_examples=60)
@given(st.binary(max_size=60) | (VALUES | QUESTIONS).map(lambda value: json.dumps(value).encode()))
def test_garbage(client, body):
    response = client.post("/v1/recommend", content=body)
    assert response.status_code in (200, 400, 422)
    if response.status_code != 200:
        assert said(response)


def test_addresses_and_methods_that_are_not_there(client):
    for method, address, status in (("GET", "/v2", 404), ("GET", "/v1/recommend", 405), ("POST", "/health", 405)):
        response = client.request(method, address)
        assert response.status_code == status
        assert said(response).endswith("GET / is the page, POST /v1/recommend recommends")
    for address in ("/docs", "/redoc", "/openapi.json", "/page/../http.py", "/page/"):
        assert client.get(address).status_code == 404


def test_the_page_loads_its_own_files_alone(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name in ("script.js", "style.css"):
        assert f"page/{name}" in page.text
        assert client.get(f"/page/{name}").status_code == 200
    everything = "".join(client.get(address).text for address in ("/", "/page/script.js", "/page/style.css"))
    assert set(re.findall(r"https?://[^\s\"'`)]+", everything)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_an_engine_that_fails_and_one_that_dies(items, tmp_path, capfd):
    with client_of(items, engines.pipes(tmp_path)) as client:
        response = recommend(client, FAIL)
        assert response.status_code == 500
        assert said(response).startswith("the engine failed on this batch: RuntimeError after")
        response = recommend(client, DIE)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "2"
        assert said(response) == "the engine's process ended during this search; send it once more"
        ready(client.get)
        assert recommend(client, "item 1").status_code == 200
        assert client.get("/health").json() == {"status": "ready", "restarts": 1}
        assert counts(client) == {"answered": 1, "engine_failed": 1, "worker_died": 1}
        text = client.get("/metrics").text
        for line in ("worker_restarts 1.0", "engine_ready 1.0", "queue_length 0.0", "batch_size_count 3.0"):
            assert f"prefixmem_{line}" in text
        assert "prefixmem_request_seconds_count 1.0" in text
    capfd.readouterr()


def test_while_it_starts(items, tmp_path):
    folder = engines.pipes(tmp_path)
    with TestClient(make_app(items, partial(engines.waits_while_loading, str(folder)))) as client:
        engines.entered(folder)
        for response in (client.get("/health"), client.get("/v1/about"), recommend(client, "item 1")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "2"
        assert client.get("/health").json() == {"status": "starting", "restarts": 0}
        assert "the engine is starting" in said(recommend(client, "item 1"))
        assert client.get("/v1/items").status_code == 200, "names are there already"
        engines.go(folder)
        ready(client.get)


def test_an_own_fault_shows_no_traceback(client, monkeypatch):
    monkeypatch.setattr(module, "as_json", None)
    before = counts(client).get("failed", 0)
    response = recommend(client, "item 1")
    assert response.status_code == 500
    assert said(response) == "the server failed (TypeError), which is its own fault; its log has the rest"
    assert counts(client)["failed"] == before + 1


# Requests that have to be in the server at the same time are ASGI calls.


class Call:
    """A request that is sent as ASGI, whose client can go away, and its response."""

    def __init__(self, app, *history):
        self.gone, self.sent, self._asked = asyncio.Event(), [], False
        self._body = json.dumps({"history": list(history)}).encode()
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"}
        scope |= {"path": "/v1/recommend", "raw_path": b"/v1/recommend", "query_string": b"", "headers": []}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.sent.append(message)

    async def response(self):
        await asyncio.wait_for(self.task, 60)
        return self.sent[0]["status"], dict(self.sent[0]["headers"]), self.sent[1]["body"].decode()


@asynccontextmanager
async def started(items, folder, **options):
    app = make_app(items, partial(engines.says, str(folder)), **options)
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.worker.state == "ready")
        yield app, app.state.worker


async def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def holding(app, folder):
    """A request that the engine has and does not answer yet."""
    call = Call(app, WAIT)
    await asyncio.to_thread(engines.entered, folder)
    return call


def test_a_client_that_goes_away_takes_its_request_along(items, tmp_path):
    folder = engines.pipes(tmp_path)

    async def go():
        async with started(items, folder) as (app, worker):
            held = await holding(app, folder)
            leaving, staying = Call(app, "item 1"), Call(app, "item 5")
            await until(lambda: worker.waiting == 2)
            leaving.gone.set()
            assert (await leaving.response())[0] == 499
            assert worker.waiting == 1
            await asyncio.to_thread(engines.go, folder)
            assert (await held.response())[0] == (await staying.response())[0] == 200

    asyncio.run(go())


def test_a_full_queue_and_a_deadline(items, tmp_path):
    folder = engines.pipes(tmp_path)

    async def go():
        async with started(items, folder, queue=1, deadline=1.0) as (app, worker):
            held = await holding(app, folder)
            waiting = Call(app, "item 1")
            await until(lambda: worker.waiting == 1)
            status, headers, body = await Call(app, "item 1").response()
            assert (status, headers[b"retry-after"]) == (503, b"1")
            assert "1 requests wait already, which is the limit (--queue)" in body
            for late in (waiting, held):
                status, _, body = await late.response()
                assert status == 504
                assert "no answer within 1 s (--deadline)" in body
            assert worker.waiting == 0
            await asyncio.to_thread(engines.go, folder)
            assert (await Call(app, "item 1").response())[0] == 200

    asyncio.run(go())


def test_the_end_answers_what_is_in_flight(items, tmp_path):
    folder = engines.pipes(tmp_path)

    async def once_closing(worker):
        await until(worker._closing.is_set)
        await asyncio.to_thread(engines.go, folder)

    async def go():
        async with started(items, folder) as (app, worker):
            calls = [await holding(app, folder), Call(app, "item 1")]
            await until(lambda: worker.waiting == 1)
            release = asyncio.ensure_future(once_closing(worker))
        await release
        for call in calls:
            assert (await call.response())[0] == 200
        status, _, body = await Call(app, "item 1").response()
        assert status == 503
        assert "the server is stopping" in body

    asyncio.run(go())


@pytest.mark.parametrize("deadline", [0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_is_none(items, deadline):
    with pytest.raises(ValueError, match=r"deadline = .*; give a number of seconds above 0"):
        make_app(items, engines.says, deadline=deadline)


def test_ports(items):
    with module.bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ValueError, match=f"port = {port}: Address already in use; give another, or port 0"):
            module.bound("127.0.0.1", port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=rf"port = {port}; allowed are 0\.\.65535"):
            module.bound("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"host = 'no\.such\.host\.invalid'"):
        module.bound("no.such.host.invalid", 0)
