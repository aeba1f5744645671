"""`prefixmem plan`."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from .._choices import ROW_OPTIMIZERS, SENT_DTYPES

if TYPE_CHECKING:
    from ..distributed.plan import Layout

_COLUMNS = ("layout", "fits", "bytes a rank", "bytes sent a SID", "us a SID", "ms a step")
_MOST = 2**63 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, metavar: str, default: float, text: str) -> None:
        kind = _whole if isinstance(default, int) else _positive
        text = f"{text} (default: {default:g})"
        parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)

    parser.add_argument("--gpus", type=_whole, metavar="W", required=True, help="one rank on each")
    number("--gpus-per-host", "N", 8, "GPUs of one host; with fewer --gpus all are on one")
    number("--gpu-gb", "GB", 80.0, "memory of a GPU")
    number("--host-gb", "GB", 2000.0, "memory of a host, of which tables may take 80 %%")
    number("--room", "SHARE", 0.7, "of a GPU's memory that tables may take")
    number("--link-gb", "GB", 50.0, "that a rank sends to others in a second")
    number("--items", "I", 1_000_000_000, "of the catalogue")
    number("--rows", "T", 2_000_000, "of a hashed table")
    number("--codes", "K", 2048, "of each level")
    number("--levels", "L", 5, "codes of a Semantic ID")
    number("--orders", "N", 4, "the longest prefix that is hashed")
    number("--heads", "H", 4, "hashes of an order")
    number("--memory-dim", "D", 256, "d_mem, H rows side by side")
    number("--active", "A", 2, "how many levels read the memory")
    parser.add_argument("--table-dtype", choices=SENT_DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument(
        "--optimizer", choices=ROW_OPTIMIZERS, default="row-adagrad", help="of the tables (default: %(default)s)"
    )
    parser.add_argument(
        "--gradients", choices=SENT_DTYPES, help="dtype of the gradient of S between ranks (default: the tables')"
    )
    number("--batch", "M", 16_384, "Semantic IDs a rank in a step; what dense DDP sends is divided among them")
    parser.add_argument("--encoder-alone", action="store_true", help="no language model trains beside the encoder")


def run(options: argparse.Namespace) -> int:
    _check(options)
    from ..distributed import plan
    from ..distributed.capacity import CatalogueSize

    width = options.memory_dim // options.heads
    gradients = options.gradients or options.table_dtype
    catalogue = CatalogueSize(
        items=options.items,
        codes=options.codes,
        orders=options.orders,
        heads=options.heads,
        width=width,
        row_bytes=width * plan.NUMBER_BYTES[options.table_dtype],
        state_bytes=plan.state_bytes(options.optimizer, width),
        active=options.active,
        levels=options.levels,
    )
    cluster = plan.Cluster(
        gpus=options.gpus,
        gpus_per_host=options.gpus_per_host,
        gpu_bytes=options.gpu_gb * 1e9,
        host_bytes=options.host_gb * 1e9,
        room=options.room,
        link=options.link_gb * 1e9,
    )
    layouts = plan.layouts(catalogue, options.rows, cluster, plan.NUMBER_BYTES[gradients], options.batch)
    choice = plan.recommend(layouts, cluster, options.encoder_alone)
    cast = None if gradients == options.table_dtype else gradients
    rows = catalogue.hashed_rows(options.rows)
    found = {
        "items": options.items,
        "table_rows": options.rows,
        "rows": rows,
        "bytes": catalogue.bytes(rows),
        "prefixes_a_row": catalogue.prefixes()[-1] / options.rows,
        "layouts": [
            {
                "name": layout.name,
                "fits": layout.fits,
                "bytes_a_rank": layout.rank_bytes,
                "bytes_sent_a_sid": layout.sent_bytes,
                "microseconds_a_sid": plan.microseconds(layout, cluster),
            }
            for layout in layouts
        ],
        "recommended": choice.layout and choice.layout.name,
        "why": choice.why,
        "code": choice.layout and plan.how_to(choice.layout, catalogue, cluster, options.optimizer, cast),
    }
    print(json.dumps(found, indent=2) if options.json else _page(found, layouts, choice.layout, options.batch))
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, most in (("orders", "levels"), ("active", "levels"), ("heads", "memory_dim")):
        value, limit = getattr(options, name), getattr(options, most)
        if value > limit:
            raise ValueError(f"--{name} = {value} is above {_flag(most)} = {limit}")
    if options.memory_dim % options.heads:
        raise ValueError(f"--memory-dim = {options.memory_dim} is no multiple of --heads = {options.heads}")
    if options.levels > 1024:  # MOST_LEVELS of addressing/spec.py
        raise ValueError(f"--levels = {options.levels} is above 1024")
    if options.gpus > options.gpus_per_host and options.gpus % options.gpus_per_host:
        raise ValueError(
            f"--gpus = {options.gpus} is no multiple of --gpus-per-host = {options.gpus_per_host}; "
            "give the GPUs that each host has"
        )
    if options.room > 1:
        raise ValueError(f"--room = {options.room:g} is above 1; give a share of a GPU's memory")


def _page(found: dict[str, Any], layouts: list[Layout], chosen: Layout | None, batch: int) -> str:
    from ..distributed.capacity import size_text

    lines = [_COLUMNS]
    for layout, figures in zip(layouts, found["layouts"], strict=True):
        time, fits = figures["microseconds_a_sid"], "yes" if layout.fits else "no"
        sent = f"{layout.sent_bytes:,.0f}"
        lines.append((layout.text, fits, size_text(layout.rank_bytes), sent, _short(time), _short(time * batch / 1e3)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        f"{found['items']:,} items, T = {found['table_rows']:,}: "
        f"{found['rows']:,} rows, {size_text(found['bytes'])} with the optimizer's state",
        f"prefixes of the last order to a row: {found['prefixes_a_row']:.3g}",
        "",
    ]
    for first, *cells in lines:
        numbers = (f"   {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        text.append(first.ljust(widths[0]) + "".join(numbers))
    text += ["", f"{chosen.text if chosen else 'nothing fits'}: {found['why']}"]
    if chosen:
        text += ["", *(f"    {line}" for line in found["code"])]
    return "\n".join(text)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _whole(text: str) -> int:
    """A whole number, which may have an exponent."""
    try:
        number = float(text) if any(letter in text for letter in ".eEnN") else int(text)
    except ValueError:
        number = math.nan
    if not 1 <= number <= _MOST or number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(number)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")
    return number
