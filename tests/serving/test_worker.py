"""The engine's process: what waits is answered once, or told why not, whatever becomes of the process."""

import os
import signal
import threading
from functools import partial

import pytest

from prefixmem_fast.serving.engine import Request
from prefixmem_fast.serving.worker import NotReady, QueueFull, Stopping, Worker, WorkerDied, WorkerError
from tests.serving import engines
from tests.serving.engines import SECONDS


def request(first, *others):
    return Request((first, *others), 2)


PLAIN = request((0, 1, 5))
WAIT, DIE, FAIL, SHORT = (request(one, (0, 1, 5)) for one in (engines.WAIT, engines.DIE, engines.FAIL, engines.SHORT))


class Watched:
    """A worker, and events of its starts."""

    def __init__(self, factory, folder, **options):
        self.ready, self.failed, self.batches = threading.Semaphore(0), threading.Event(), []
        told = {"on_ready": self.ready.release, "on_failed": self.failed.set, "on_batch": self.batches.append}
        self.worker = Worker(partial(factory, str(folder)), **told, **options)

    def __enter__(self):
        self.worker.start()
        return self

    def __exit__(self, kind, *_):
        self.worker.close(SECONDS if kind is None else 0.1)
        assert self.worker.state == "stopped"
        assert self.worker.pid is None

    def wait(self):
        assert self.ready.acquire(timeout=SECONDS)
        return self.worker


@pytest.fixture
def folder(tmp_path):
    return engines.pipes(tmp_path)


def found(future):
    return future.result(SECONDS).items


def test_what_waits_goes_in_batches_and_comes_back_in_order(folder):
    with Watched(engines.says, folder, max_batch=3) as watched:
        worker = watched.wait()
        assert worker.about["engine"] == "says"
        first = worker.submit(WAIT)
        engines.entered(folder)
        waiting = [worker.submit(Request(((0, 1, code),), code + 1)) for code in range(5)]
        assert worker.waiting == 5
        engines.go(folder)
        assert [len(found(future)) for future in waiting] == [1, 2, 3, 4, 5]
        assert [found(future)[0].codes for future in waiting] == [(0, 1, code) for code in range(5)]
        assert found(first)[0].codes == (0, 1, 5)
        assert watched.batches == [1, 3, 2]


def test_a_process_that_dies_in_a_search_is_started_again(folder):
    with Watched(engines.says, folder, max_batch=2) as watched:
        worker = watched.wait()
        held = worker.submit(WAIT)
        before = engines.entered(folder)
        assert before == worker.pid
        dying, beside, after = worker.submit(DIE), worker.submit(PLAIN), worker.submit(PLAIN)
        engines.go(folder)
        found(held)
        for future in (dying, beside, after):
            with pytest.raises(WorkerDied, match=r"send (it|the request) once more"):
                future.result(SECONDS)
        worker = watched.wait()
        assert (worker.state, worker.restarts) == ("ready", 1)
        assert worker.pid != before
        assert found(worker.submit(PLAIN))


def test_who_is_told_of_the_end_finds_no_engine_ready(folder, monkeypatch):
    """While the process that has ended is still waited for."""
    end, reaped = Worker._end, threading.Event()
    monkeypatch.setattr(Worker, "_end", lambda self: (reaped.wait(SECONDS), end(self))[1])
    with Watched(engines.says, folder) as watched:
        worker = watched.wait()
        with pytest.raises(WorkerDied):
            worker.submit(DIE).result(SECONDS)
        state = worker.state
        with pytest.raises(NotReady):
            worker.submit(PLAIN)
        reaped.set()
        assert state == "starting"
        assert found(watched.wait().submit(PLAIN))


def test_a_process_that_is_killed_while_nothing_is_asked(folder):
    with Watched(engines.says, folder) as watched:
        os.kill(watched.wait().pid, signal.SIGKILL)
        assert found(watched.wait().submit(PLAIN))


def test_signals_that_reach_the_whole_group_leave_the_engine_at_work(folder):
    with Watched(engines.says, folder) as watched:
        worker = watched.wait()
        future = worker.submit(WAIT)
        pid = engines.entered(folder)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        engines.go(folder)
        assert found(future)
        assert (worker.pid, worker.restarts) == (pid, 0)


def test_a_batch_that_fails_is_told_and_the_next_one_is_answered(folder, capfd):
    with Watched(engines.says, folder) as watched:
        worker = watched.wait()
        for wrong, text in ((FAIL, "RuntimeError after"), (SHORT, "RuntimeError after")):
            with pytest.raises(WorkerError, match=text) as error:
                worker.submit(wrong).result(SECONDS)
            assert "out of luck" not in str(error.value)
        assert found(worker.submit(PLAIN))
        assert worker.restarts == 0
        for _ in range(3):
            with pytest.raises(WorkerError):
                worker.submit(FAIL).result(SECONDS)
        assert found(watched.wait().submit(PLAIN))
        assert worker.restarts == 1, "an engine that fails every time is replaced"
    log = capfd.readouterr().err
    assert "out of luck" in log
    assert "the engine answered 0 of 1 requests" in log


def test_a_search_that_never_ends(folder):
    with Watched(engines.says, folder, stuck_seconds=0.2) as watched:
        future = watched.wait().submit(WAIT)
        engines.entered(folder)
        with pytest.raises(WorkerDied):
            future.result(SECONDS)
        assert found(watched.wait().submit(PLAIN))


def test_a_full_queue_and_a_cancelled_request(folder):
    with Watched(engines.says, folder, queue=2) as watched:
        worker = watched.wait()
        first = worker.submit(WAIT)
        engines.entered(folder)
        second, third = worker.submit(PLAIN), worker.submit(PLAIN)
        with pytest.raises(QueueFull, match="2 requests wait already"):
            worker.submit(PLAIN)
        assert second.cancel()
        assert worker.waiting == 1
        fourth = worker.submit(PLAIN)
        assert not first.cancel(), "it is in the engine"
        engines.go(folder)
        assert found(third)
        assert found(fourth)
        assert watched.batches == [1, 2]


def test_closing_answers_what_waits(folder):
    with Watched(engines.says, folder, max_batch=1) as watched:
        worker = watched.wait()
        futures = [worker.submit(WAIT)]
        engines.entered(folder)
        futures += [worker.submit(PLAIN) for _ in range(3)]
        closing = threading.Thread(target=worker.close)
        closing.start()
        worker._closing.wait(SECONDS)
        with pytest.raises(Stopping):
            worker.submit(PLAIN)
        engines.go(folder)
        assert all(found(future) for future in futures)
        closing.join(SECONDS)
        assert worker.pid is None


def test_closing_while_it_loads(folder):
    with Watched(engines.waits_while_loading, folder) as watched:
        engines.entered(folder)
        assert watched.worker.state == "starting"
        with pytest.raises(NotReady):
            watched.worker.submit(PLAIN)


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (engines.loads_never, "the folder is empty"),
        (engines.dies_while_loading, "the engine's process ended with exit code -9 while it loaded the model"),
    ],
)
def test_a_first_start_that_fails_is_the_end(folder, factory, why):
    with Watched(factory, folder) as watched:
        assert watched.failed.wait(SECONDS)
        assert (watched.worker.state, watched.worker.failure) == ("failed", why)
        with pytest.raises(NotReady):
            watched.worker.submit(PLAIN)


def test_a_later_start_that_fails_is_tried_again(folder, capfd):
    with Watched(engines.loads_once, folder) as watched:
        os.kill(watched.wait().pid, signal.SIGKILL)
        assert found(watched.wait().submit(PLAIN))
        assert (watched.worker.restarts, watched.worker.failure) == (2, None)
    assert "could not be loaded: the disk is away" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["max_batch", "queue"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} = 0 is not positive"):
        Worker(engines.says, **{name: 0})
