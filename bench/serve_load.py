"""Load on a running `prefixmem serve`: every request has to be answered, and with what the engine finds.

    prefixmem serve runs/prefixmem --catalogue items.index.json
    python -m bench.serve_load http://127.0.0.1:8000 runs/prefixmem --catalogue items.index.json \
        --out bench/results/serve.jsonl

Histories of random items are searched by the engine on transformers in this process first, one at a time. Then threads
send them, each over a connection of its own, one request after the other. A request that is refused is not sent again.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from .rows import OURS, append_rows, check_out

_SCORE_ERROR = 1e-3  # of a log-probability: a batch adds in another order than a history alone
_SECONDS = 120  # after which an answer counts as lost


@dataclass
class Load:
    """What became of requests.

    Attributes:
        seconds: from each request to its answer, of those with status 200.
        outcomes: "right", "wrong", a status, or "lost" where the connection ended without an answer.
        elapsed: seconds that all took together.
    """

    seconds: list[float] = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)
    elapsed: float = 0.0


def send(address: str, bodies: Sequence[dict], expected: Sequence[dict], requests: int, at_a_time: int) -> Load:
    """Send requests, round and round through `bodies`.

    Args:
        expected: the ``items`` of the answer to each body.
    """
    load, lock, numbers = Load(), threading.Lock(), itertools.count()
    host = urlsplit(address).netloc

    def work() -> None:
        connection = http.client.HTTPConnection(host, timeout=_SECONDS)
        while (number := next(numbers)) < requests:
            place = number % len(bodies)
            began = time.perf_counter()
            try:
                connection.request("POST", "/v1/recommend", json.dumps(bodies[place]))
                response = connection.getresponse()
                status, content = response.status, response.read()
            except (OSError, http.client.HTTPException):
                connection.close()  # the next request opens it again
                status = None
            seconds = time.perf_counter() - began
            with lock:
                if status == 200:
                    load.seconds.append(seconds)
                    load.outcomes["right" if same(json.loads(content)["items"], expected[place]) else "wrong"] += 1
                else:
                    load.outcomes["lost" if status is None else str(status)] += 1
        connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        for done in [pool.submit(work) for _ in range(at_a_time)]:
            done.result()
    load.elapsed = time.perf_counter() - began
    return load


def same(found: list[dict], expected: list[dict]) -> bool:
    """Whether two rankings are one: the same scores place by place, and the same items but for those that tie."""
    scores = [[item["logprob"] for item in items] for items in (found, expected)]
    if len(found) != len(expected) or not np.allclose(*scores, rtol=0, atol=_SCORE_ERROR):
        return False
    known = {tuple(item["sid"]): item for item in expected}
    for item in found:
        other = known.get(tuple(item["sid"]))
        if other is None:  # the last places may be shared with an item that has just missed them
            if item["logprob"] > expected[-1]["logprob"] + _SCORE_ERROR:
                return False
        elif other["names"] != item["names"] or abs(other["logprob"] - item["logprob"]) > _SCORE_ERROR:
            return False
    return True


def questions(engine: Any, distinct: int, num_beams: int, longest: int) -> tuple[list[dict], list[list[dict]]]:
    """Bodies of requests over random histories, and the items that the engine finds for each."""
    from prefixmem_fast.serving.engine import Request
    from prefixmem_fast.serving.http import as_json

    random, catalogue = np.random.default_rng(0), engine.served.catalogue
    bodies, expected = [], []
    for _ in range(distinct):
        rows = random.integers(len(catalogue), size=int(random.integers(1, longest + 1)))
        (search,) = engine.search([Request(tuple(tuple(catalogue.codes[row].tolist()) for row in rows), num_beams)])
        bodies.append({"history": [catalogue.items[row] for row in rows], "num_beams": num_beams})
        expected.append(as_json(search, num_beams)["items"])
    return bodies, expected


def row_of(load: Load, workload: dict[str, Any], **more: Any) -> dict[str, Any]:
    quantiles = {f"p{q}": float(np.percentile(load.seconds, q)) * 1e3 for q in (20, 50, 80, 95, 99)}
    return {
        "benchmark": "serve",
        "workload": workload,
        "provider": OURS,
        "metric": "latency",
        "unit": "ms",
        "repeats": len(load.seconds),
        **quantiles,
        "outcomes": dict(load.outcomes),
        "requests_per_second": len(load.seconds) / load.elapsed,
        **more,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of the server, as it says it")
    parser.add_argument("folder", help="that it serves")
    parser.add_argument("--catalogue", required=True, metavar="FILE")
    parser.add_argument("--requests", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--at-a-time", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--distinct", type=int, default=64, help="histories (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--longest", type=int, default=8, help="items of a history, at most (default: %(default)s)")
    parser.add_argument("--note", help="kept with the row: what else the machine did")
    parser.add_argument("--out", type=Path, help="append a row to this file")
    options = parser.parse_args(arguments)
    if options.out is not None:
        check_out(options.out)
    from prefixmem_fast.serving.transformers_engine import TransformersEngine

    from .machine import run_record

    engine = TransformersEngine(options.folder, options.catalogue)
    bodies, expected = questions(engine, options.distinct, options.beams, options.longest)
    load = send(options.address, bodies, expected, options.requests, options.at_a_time)
    workload = {"requests": options.requests, "at_a_time": options.at_a_time, "beams": options.beams}
    workload |= {
        "longest_history": options.longest,
        "items": len(engine.served.catalogue),
        "levels": engine.trie.levels,
    }
    described = {name: engine.describe()[name] for name in ("engine", "model", "encoder")}
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    if load.seconds:
        row = row_of(load, workload, **described, parameters=parameters, note=options.note)
        print(json.dumps(row, indent=1))
        if options.out is not None:
            append_rows(options.out, run_record(), [row])
    lost = options.requests - load.outcomes["right"]
    print(f"{load.outcomes['right']} of {options.requests} answered as the engine does; others: {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
