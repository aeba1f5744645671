"""An engine in a process of its own, and the requests that wait for it.

A thread takes what waits, in batches, and sends it over a pipe. Where the process ends by itself, the requests that it
had and those that wait are given up, and a new process is started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from .. import _checks
from .._inputs import clipped
from .._progress import say
from .engine import Engine, Request, Search

_FAILURES = 3  # batches that fail one after another before the process is taken for broken
_PAUSE = (0.5, 30.0)  # seconds between two starts, the first and the longest


class WorkerError(Exception):
    """A request without an answer; `outcome` names the reason in metrics."""

    outcome = "engine_failed"


class NotReady(WorkerError):
    outcome = "starting"


class QueueFull(WorkerError):
    outcome = "queue_full"


class WorkerDied(WorkerError):
    outcome = "worker_died"


class Stopping(WorkerError):
    outcome = "stopping"


class Worker:
    """The process, its queue, and the thread between them.

    Args:
        factory: makes the engine, in the process: a function of a module, or a partial of one.
        max_batch: requests that are sent together.
        queue: requests that may wait.
        stuck_seconds: a batch that takes longer has the process ended and started again.
        on_batch: told the size of each batch.
        on_ready: told each time that the engine is loaded.
        on_failed: told if the engine cannot be loaded at the first start; the worker then stays without one.

    Attributes:
        state: "starting", "ready", "failed" or "stopped".
        about: what the engine's `describe` returned; None before the first start.
        failure: why the first start failed, or None.
        restarts: processes started in place of one that ended.
        pid: of the process, or None.
        on_batch, on_ready, on_failed: as given.
    """

    def __init__(
        self,
        factory: Callable[[], Engine],
        *,
        max_batch: int = 16,
        queue: int = 256,
        stuck_seconds: float = 300.0,
        on_batch: Callable[[int], object] = lambda size: None,
        on_ready: Callable[[], object] = lambda: None,
        on_failed: Callable[[], object] = lambda: None,
    ) -> None:
        self.max_batch, self.queue = _checks.positive("max_batch", max_batch), _checks.positive("queue", queue)
        self.state, self.about, self.failure, self.restarts, self.pid = "starting", None, None, 0, None
        self._factory, self._stuck_seconds = factory, stuck_seconds
        self.on_batch, self.on_ready, self.on_failed = on_batch, on_ready, on_failed
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._waiting: deque[tuple[Request, Future]] = deque()
        self._process: Any = None
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="prefixmem worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, request: Request) -> Future[Search]:
        """Have a request searched; cancelling the future takes it out of the queue.

        Raises:
            NotReady, QueueFull, Stopping: it is not taken.
        """
        future: Future[Search] = Future()
        with self._lock:
            if self._closing.is_set():
                raise Stopping("the server is stopping; send the request to another one")
            if self.state != "ready":
                raise NotReady("the engine is starting; try again, GET /health says when it is ready")
            if len(self._waiting) >= self.queue:
                raise QueueFull(f"{self.queue} requests wait already, which is the limit (--queue); try again later")
            entry = request, future
            self._waiting.append(entry)
        future.add_done_callback(lambda done: self._forget(entry) if done.cancelled() else None)
        self._wake()
        return future

    def close(self, seconds: float = 60.0) -> None:
        """Answer what waits, end the process, and take no more; a process that takes longer is killed."""
        self._closing.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()
            self._thread.join()
        self.state = "stopped"
        self._woken.close()
        self._wakes.close()
        self._give_up(Stopping("the server has stopped; send the request to another one"))

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The thread

    def _run(self) -> None:
        pause = _PAUSE[0]
        while not self._closing.is_set():
            try:
                with self._started() as connection:
                    if self._load(connection):
                        pause = _PAUSE[0]
                        self._serve(connection)
            except (EOFError, OSError):
                pass  # it has ended
            except Exception:  # what it sent cannot be read
                traceback.print_exc()
            self._not_ready()
            reason = self._end()
            if self._closing.is_set():
                break
            if self.about is None:
                self.failure = self.failure or f"the engine's process ended{reason} while it loaded the model"
                self.state = "failed"
                self.on_failed()
                break
            say(f"prefixmem serve: the engine's process ended{reason}; it is started again")
            self._give_up(WorkerDied("the engine's process has ended and is started again; send the request once more"))
            self._closing.wait(pause)
            pause = min(2 * pause, _PAUSE[1])
            self.restarts += 1
        self._give_up(Stopping("the server has stopped; send the request to another one"))

    def _started(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self._factory), name="prefixmem engine")
        try:
            self._process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()  # so that the pipe ends with the process
        self.pid = self._process.pid
        return ours

    def _load(self, connection: Connection) -> bool:
        while not connection.poll():
            wait([connection, self._woken])
            self._drain()
            if self._closing.is_set():
                self._process.kill()
                return False
        kind, told = connection.recv()
        if kind == "failed":
            self.failure = self.failure if self.about is not None else told
            say(f"prefixmem serve: the engine could not be loaded: {told}")
            return False
        self.about = told
        with self._lock:
            self.state = "ready"
        self.on_ready()
        return True

    def _serve(self, connection: Connection) -> None:
        failures = 0
        while failures < _FAILURES:
            batch = self._take()
            if not batch:
                if self._closing.is_set():
                    connection.send(None)
                    return
                if connection in wait([connection, self._woken]):
                    connection.recv()  # nothing was asked: it is the end
                self._drain()
                continue
            self.on_batch(len(batch))
            kind, told = self._ask(connection, batch)
            failures = failures + 1 if kind == "failed" else 0
            for i, (_, future) in enumerate(batch):
                if kind == "failed":
                    future.set_exception(WorkerError(f"the engine failed on this batch: {told}; the log has the rest"))
                else:
                    future.set_result(told[i])
        say(f"prefixmem serve: the engine failed on {_FAILURES} batches in a row")

    def _ask(self, connection: Connection, batch: Sequence[tuple[Request, Future]]) -> tuple[str, Any]:
        try:
            connection.send([request for request, _ in batch])
            if not connection.poll(self._stuck_seconds):
                say(f"prefixmem serve: a batch has taken more than {self._stuck_seconds:g} s")
                raise EOFError
            return connection.recv()
        except BaseException:
            self._not_ready()  # first: who is told now asks next whether the engine is ready
            for _, future in batch:
                future.set_exception(WorkerDied("the engine's process ended during this search; send it once more"))
            raise

    def _not_ready(self) -> None:
        with self._lock:
            if self.state == "ready":
                self.state = "starting"

    def _take(self) -> list[tuple[Request, Future]]:
        """What waits, up to a batch, without what has been cancelled."""
        batch = []
        with self._lock:
            while self._waiting and len(batch) < self.max_batch:
                entry = self._waiting.popleft()
                if entry[1].set_running_or_notify_cancel():
                    batch.append(entry)
        return batch

    def _end(self) -> str:
        """Reap the process; how it ended."""
        process, self._process, self.pid = self._process, None, None
        if process is None or process.pid is None:
            return ""
        if not self._closing.is_set():
            process.join(1.0)  # it is about to end, or stuck
        else:
            process.join(30.0)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        return f" with exit code {code}"

    def _give_up(self, reason: WorkerError) -> None:
        with self._lock:
            entries, self._waiting = list(self._waiting), deque()
        for _, future in entries:
            with suppress(InvalidStateError, CancelledError):
                if future.set_running_or_notify_cancel():
                    future.set_exception(reason)

    def _forget(self, entry: tuple[Request, Future]) -> None:
        with self._lock, suppress(ValueError):
            self._waiting.remove(entry)

    def _wake(self) -> None:
        with suppress(OSError):  # full: it is awake already
            self._wakes.send(b"x")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096, socket.MSG_DONTWAIT)


def work(connection: Connection, factory: Callable[[], Engine]) -> None:
    """The process: load the engine, and answer batches until the pipe ends or None comes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach a group; the server finishes what is in flight
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    try:
        engine = factory()
        connection.send(("ready", engine.describe()))
    except Exception as error:
        if not isinstance(error, (ValueError, TypeError, OSError, ImportError, NotImplementedError)):
            traceback.print_exc()
        connection.send(("failed", clipped(str(error) or type(error).__name__, 2000)))
        return
    with suppress(EOFError, OSError):  # the server has gone
        while (requests := connection.recv()) is not None:
            began = time.monotonic()
            try:
                reply = "found", engine.search(requests)
                if len(reply[1]) != len(requests):
                    raise RuntimeError(f"the engine answered {len(reply[1])} of {len(requests)} requests")
            except Exception as error:
                traceback.print_exc()
                reply = "failed", f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
            connection.send(reply)


def _end_with_the_server() -> None:
    """A server that is killed tells nobody; a search may still be under way."""
    multiprocessing.parent_process().join()
    os._exit(1)
