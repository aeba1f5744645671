"""`prefixmem serve`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from functools import partial

from .._choices import ENGINES
from .train import folder_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=folder_name,
        metavar="FOLDER",
        help="a folder of prefixmem train, or of a model's save_pretrained with an encoder or a SIDVocabulary in it",
    )
    parser.add_argument(
        "--catalogue", type=folder_name, required=True, metavar="FILE", help="index of the items that are recommended"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto takes vllm where it is installed (default: %(default)s)"
    )
    parser.add_argument(
        "--vllm",
        type=json.loads,
        metavar="JSON",
        help="further arguments of vllm.LLM",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-history", type=int, help="items of a history (default: as in training, else 256)")
    limits.add_argument("--max-beams", type=int, default=50, help="beams of a search (default: %(default)s)")
    limits.add_argument("--max-batch", type=int, default=16, help="requests searched together (default: %(default)s)")
    limits.add_argument("--queue", type=int, default=256, help="requests that may wait (default: %(default)s)")
    limits.add_argument(
        "--deadline", type=float, default=30.0, metavar="SECONDS", help="for a request (default: %(default)s)"
    )
    prompts = parser.add_argument_group("prompts", "what stands in them as it did in training; names or ids of tokens")
    prompts.add_argument(
        "--start", metavar="TOKEN", help="before a history; none for nothing (default: as prefixmem train puts it)"
    )
    prompts.add_argument("--begin", metavar="TOKEN", help="before each Semantic ID (default: nothing)")
    prompts.add_argument("--end", metavar="TOKEN", help="after each Semantic ID (default: nothing)")
    prompts.add_argument("--token-format", metavar="TEMPLATE", help="of the catalogue's tokens (default: recognised)")


def run(options: argparse.Namespace) -> int:
    for name in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name} is not installed: pip install 'prefixmem_fast[serve]'")
    for name in ("max_history", "max_beams", "max_batch", "queue"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} = {value}; give 1 or more")
    from ..serving.engine import make_engine
    from ..serving.http import bound, make_app, serve
    from ..serving.questions import Items

    items = Items(options.folder, options.catalogue, options.token_format)
    engine = partial(
        make_engine,
        options.engine,
        options.folder,
        options.catalogue,
        max_history=options.max_history,
        max_beams=options.max_beams,
        vllm=options.vllm,
        start=options.start,
        begin=options.begin,
        end=options.end,
        token_format=options.token_format,
    )
    app = make_app(items, engine, deadline=options.deadline, max_batch=options.max_batch, queue=options.queue)
    with bound(options.host, options.port) as listening:

        def say_where(address: str) -> None:
            about = app.state.worker.about
            if options.json:
                print(json.dumps({"address": address, **about}), flush=True)
                return
            on = f"{about['engine']} {about['version']}"
            print(f"{about['items']:,} items by {about['model']} on {on}: {address}", flush=True)

        serve(app, listening, say_where, options.deadline)
    return 0
