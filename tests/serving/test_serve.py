"""`prefixmem serve` as a process: it says where it listens, answers, and ends well."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from prefixmem_fast.cli import main
from prefixmem_fast.serving.engine import Request
from prefixmem_fast.serving.http import as_json
from prefixmem_fast.serving.transformers_engine import TransformersEngine
from tests.helpers.imports import ROOT
from tests.serving import engines
from tests.serving.folders import sids, write_index, write_model

SAYS = """
import sys
from functools import partial
from prefixmem_fast.serving.http import bound, make_app, serve
from prefixmem_fast.serving.questions import Items
from tests.serving import engines
if __name__ == "__main__":
    folder = sys.argv[1]
    app = make_app(Items(folder, folder + "/items.json"), partial(engines.says, folder))
    serve(app, bound("127.0.0.1", 0), lambda address: print(address, flush=True))
"""


@contextmanager
def process(*command):
    """A server as a process, and what it says first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, env=environment
    ) as one:
        try:
            yield one, one.stdout.readline()
        finally:
            one.kill()


def post(address, *history, **more):
    return httpx2.post(f"{address}/v1/recommend", json={"history": list(history), **more}, timeout=60)


def accepts(address):
    try:
        return httpx2.get(f"{address}/health").status_code
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_the_command_answers_what_the_engine_finds(tmp_path):
    write_model(tmp_path / "model", "gpt2", "prefixmem")
    index = write_index(tmp_path / "items.json")
    command = ["serve", tmp_path / "model", "--catalogue", index, "--port", "0", "--start", "1", "--json"]
    expected = TransformersEngine(tmp_path / "model", index, start=1)
    with process("-m", "prefixmem_fast.cli", *command) as (server, line):
        said = json.loads(line)
        assert said["engine"] == "transformers"
        histories = [(i % 8, (i + 3) % 8)[: 1 + i % 2] for i in range(12)]
        with ThreadPoolExecutor(8) as pool:
            asked = [
                pool.submit(post, said["address"], *(f"item {i}" for i in items), num_beams=5) for items in histories
            ]
        for items, answer in zip(histories, asked, strict=True):
            (search,) = expected.search([Request(sids(*items), 5)])
            wanted, found = as_json(search, 5), answer.result().json()
            assert [one["names"] for one in found["items"]] == [one["names"] for one in wanted["items"]]
            for one, other in zip(found["items"], wanted["items"], strict=True):
                assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-5)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def program_that_says(folder):
    """A program that serves a model whose engine waits to be told to go on."""
    write_model(folder, kind="bare")
    write_index(folder / "items.json")
    engines.pipes(folder)
    program = folder / "says.py"
    program.write_text(SAYS)
    return program


@pytest.mark.slow
def test_the_end_of_a_server_is_graceful(tmp_path):
    with process(program_that_says(tmp_path), tmp_path) as (server, line), ThreadPoolExecutor(2) as pool:
        address = line.strip()
        held = pool.submit(post, address, "item 0")
        engines.entered(tmp_path)
        waiting = pool.submit(post, address, "item 1")
        while "queue_length 1.0" not in httpx2.get(f"{address}/metrics").text:
            pass
        server.send_signal(signal.SIGTERM)
        while accepts(address):
            pass
        assert not held.done(), "new ones are refused, those in flight are not"
        engines.go(tmp_path)
        assert held.result(60).status_code == waiting.result(60).status_code == 200
        assert server.wait(60) == 0


def runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_engine_behind(tmp_path):
    with process(program_that_says(tmp_path), tmp_path) as (server, line), ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, line.strip(), "item 0")
        pid = engines.entered(tmp_path)
        assert runs(pid)
        server.kill()
        with pytest.raises(httpx2.TransportError):
            held.result(60)
        end = time.monotonic() + engines.SECONDS
        while runs(pid):
            assert time.monotonic() < end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("served")
    write_model(made / "model")
    write_index(made / "items.json")
    return made


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none", "--catalogue", "items.json"], "none is no folder; give one of prefixmem train"),
        (["model", "--catalogue", "none.json"], "index none.json is not there"),
        (["model", "--catalogue", "items.json", "--max-beams", "0"], "--max-beams = 0; give 1 or more"),
        (["model", "--catalogue", "items.json", "--queue", "-1"], "--queue = -1; give 1 or more"),
        (["model", "--catalogue", "items.json", "--deadline", "0"], "deadline = 0.0; give a number of seconds above 0"),
        (["model", "--catalogue", "items.json", "--port", "70000"], "port = 70000; allowed are 0..65535"),
        pytest.param(  # the engine's process says it
            ["model", "--catalogue", "items.json", "--port", "0", "--start", "<s>"],
            "and the folder has no tokenizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(folder, capsys, monkeypatch, arguments, text):
    monkeypatch.chdir(folder)
    assert main(["serve", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("prefixmem serve: ")
    assert text in line


def test_what_is_not_installed_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else True)
    assert main(["serve", str(folder / "model"), "--catalogue", "items.json"]) == 2
    assert "uvicorn is not installed: pip install 'prefixmem_fast[serve]'" in capsys.readouterr().err
