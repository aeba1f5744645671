"""`prefixmem inspect`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._choices import LAYOUTS, MOST_HISTORY

_ROWS, _HEADS, _ORDER, _DIM = 2_000_000, 4, 4, 256  # of the paper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", help="an index file: .json, .npy, .pt or .parquet")
    parser.add_argument("--codebook-sizes", metavar="K,..", help="K_1,..,K_L; what the index shows unless given")
    parser.add_argument("--token-format", help="template of the index's tokens; recognised unless given")
    parser.add_argument("--layout", choices=LAYOUTS, help="of an array (default: the longer side counts the items)")
    parser.add_argument("--table-rows", type=int, default=_ROWS, help="T, rows of a table (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=_HEADS, help="H (default: %(default)s)")
    parser.add_argument("--max-order", type=int, default=_ORDER, help="N (default: %(default)s)")
    parser.add_argument("--memory-dim", type=int, default=_DIM, help="d_mem (default: %(default)s)")
    parser.add_argument("--interactions", nargs="+", metavar="FILE", help="histories: which prefixes are hot")
    parser.add_argument(
        "--history",
        type=int,
        default=0,
        help="as of train: how many of the items before are read; needs --interactions",
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the figures, as .png or any other format of matplotlib")


def run(options: argparse.Namespace) -> int:
    import json

    from .._files import check_writable

    if options.history < 0:
        raise ValueError(f"--history = {options.history}; give 1 for the item before, more, or 0 for none")
    if options.history > MOST_HISTORY:
        raise ValueError(f"--history = {options.history}; give {MOST_HISTORY} or less")
    if options.history and not options.interactions:
        raise ValueError("--history needs --interactions: cross-item orders are those of histories")
    if options.picture is not None:
        _check_picture(Path(options.picture))
        check_writable(Path(options.picture).parent)
    report = report_of(options)
    if options.picture is not None:
        from ..recommender.evaluation.plots import plot_catalogue

        Path(options.picture).parent.mkdir(parents=True, exist_ok=True)
        plot_catalogue(report, options.picture)
    print(json.dumps(report, indent=2) if options.json else _summary(report, options), flush=True)
    return 0


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain numbers, lists and dicts."""
    from ..addressing import AddressSpec
    from ..sid import Catalogue, statistics

    catalogue = Catalogue.load(
        options.index,
        codebook_sizes=_sizes(options.codebook_sizes),
        token_format=options.token_format,
        layout=options.layout,
    )
    codes, sizes = catalogue.codes, catalogue.codebook_sizes
    spec = AddressSpec(
        sizes, max_order=options.max_order, heads=options.heads, table_rows=options.table_rows, active_levels=None
    )
    shared = statistics.shared_sids(codes)
    row = shared.pop("largest_row")
    shared["largest_item"] = catalogue.items[row] if shared["items"] else None
    report: dict[str, Any] = {
        "index": str(options.index),
        "items": len(catalogue),
        "codebook_sizes": list(sizes),
        "levels": statistics.codebook_use(codes, sizes),
        "prefixes": [count for _, count in statistics.prefix_groups(codes, sizes)],
        "shared_sids": shared,
        "heads": options.heads,
        "orders": statistics.table_use(codes, spec),
        "memory_dim": options.memory_dim,
        "memory": statistics.table_bytes(spec, options.memory_dim),
    }
    if options.interactions:
        from ..recommender.data import load_interactions

        histories = load_interactions(options.interactions, catalogue)
        if not histories.interactions:
            raise ValueError("--interactions holds no interaction; give histories of items")
        report["users"], report["interactions"] = len(histories), histories.interactions
        report["hot"] = statistics.hot_prefixes(codes, sizes, histories.items)
        if options.history:
            spec = AddressSpec.cross_item(sizes, heads=options.heads, table_rows=options.table_rows)
            windows = statistics.transition_windows(codes, spec, histories.items, options.history)
            report["cross_item"] = {
                "history": options.history,
                "transitions": len(windows),
                "orders": statistics.table_use(windows, spec) if len(windows) else [],
                "memory": statistics.table_bytes(spec, options.memory_dim),
            }
    return report


def _check_picture(file: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'prefixmem_fast[train]'")
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in kinds:
        raise ValueError(f"--picture = {str(file)!r} ends in none of {', '.join('.' + kind for kind in sorted(kinds))}")
    if file.exists() and not file.is_file():
        raise ValueError(f"--picture = {str(file)!r} is no file; give the name of one")


def _sizes(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise ValueError(f"--codebook-sizes = {text!r}; give whole numbers, such as 256,256,256") from None


def _summary(report: dict[str, Any], options: argparse.Namespace) -> str:
    shared = report["shared_sids"]
    lines = [f"{report['items']:,} items of {len(report['prefixes'])} codes"]
    lines.append(f"\n{'level':>5}{'codes used':>16}{'perplexity':>12}{'most used':>11}{'prefixes':>14}")
    for level, prefixes in zip(report["levels"], report["prefixes"], strict=True):
        used = f"{level['used']:,} of {level['size']:,}"
        lines.append(
            f"{level['level']:>5}{used:>16}{level['perplexity']:>12.1f}{level['most_used']:>11.1%}{prefixes:>14,}"
        )
    lines.append(f"\n{shared['distinct']:,} distinct SIDs; {shared['items']:,} items share theirs")
    if shared["items"]:
        lines[-1] += f", {shared['largest']:,} of them that of item {shared['largest_item']}"
    lines.append(f"\ntables of T = {options.table_rows:,} rows, H = {report['heads']} heads")
    lines += _orders(report["orders"])
    lines.append(_memory(report["memory"], report["memory_dim"]))
    if "hot" in report:
        lines.append(
            f"\n{report['interactions']:,} interactions of {report['users']:,} users, and the share of the top prefixes"
        )
        lines.append(f"{'length':>6}{'prefixes':>12}{'top 1':>9}{'top 10':>9}{'top 100':>9}{'half of all in':>16}")
        for row in report["hot"]:
            top = "".join(f"{share:>9.1%}" for share in row["top"].values())
            lines.append(f"{row['length']:>6}{row['prefixes']:>12,}{top}{row['half']:>16,}")
    if "cross_item" in report:
        found = report["cross_item"]
        lines.append(
            f"\ncross-item orders of {_items_before(found['history'])}: {found['transitions']:,} pairs of items"
        )
        if found["orders"]:
            lines += _orders(found["orders"], len(report["prefixes"]))
        lines.append(_memory(found["memory"], report["memory_dim"]))
    if options.picture is not None:
        lines.append(f"\ndrawn in {options.picture}")
    return "\n".join(lines)


def _orders(orders: list[dict[str, Any]], levels: int = 0) -> list[str]:
    """A table of orders; those of windows are named by the codes that they read of this item."""
    heading = f"{'order':>7}{'':>8}{'prefixes':>12}{'rows of a table':>17}{'occupied':>19}{'share a row':>23}"
    lines = [heading + f"{'in all heads':>14}"]
    for order in orders:
        name = f"L + {order['order'] - levels}" if levels else str(order["order"])
        most, share = max(order["sharing"]), max(order["sharing"]) / order["prefixes"]
        lines.append(
            f"{name:>7}{'exact' if order['exact'] else 'hashed':>8}{order['prefixes']:>12,}{order['table_rows']:>17,}"
            f"{_between(order['occupied']):>19}{f'{most:,} ({share:.1%})':>23}{order['sharing_all']:>14,}"
        )
    lines.append("share a row: prefixes of the fullest head whose row another prefix has too")
    return lines


def _items_before(count: int) -> str:
    return "the item before" if count == 1 else f"the {count} items before"


def _between(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _memory(memory: dict[str, int], dim: int) -> str:
    tables, trained = (_gib(memory[name]) for name in ("float32", "with_row_adagrad"))
    return (
        f"{memory['rows']:,} rows at d_mem = {dim}: {tables} in float32, {trained} with the state of row-wise Adagrad"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.1f} MiB"
