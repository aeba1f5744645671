"""`prefixmem index`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._choices import COLLISIONS
from .._progress import Progress

if TYPE_CHECKING:
    from ..sid.formats import TokenFormat

_FORMAT = "<{letter}_{code}>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings", required=True, metavar="FILE", help="floating numbers [items, d] in .npy or .pt, a row an item"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the index, .json; a file there is replaced")
    parser.add_argument("--levels", type=int, default=4, help="codes of an item (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=256, help="codes of a level, 2^n (default: %(default)s)")
    parser.add_argument(
        "--collisions",
        choices=COLLISIONS,
        default="keep",
        help="items that share a SID: keep it, take the nearest free code of the last level, or are numbered by one "
        "more level (default: %(default)s)",
    )
    parser.add_argument(
        "--items", metavar="FILE", help="names of the rows: a JSON list, or a text file of lines (default: row numbers)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of k-means (default: %(default)s)")
    parser.add_argument("--token-format", default=_FORMAT, help="template of a token (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    import json

    from .._files import check_writable, write_text
    from ..sid.formats import TokenFormat
    from ..sid.quantiser import check_faiss, load_embeddings, quantise
    from ..sid.statistics import codebook_use, shared_sids

    out = Path(options.out)
    _check_out(out, options)
    check_faiss()
    check_writable(out.parent)
    _check_format(options)
    embeddings = load_embeddings(options.embeddings)
    names = _names(options.items, len(embeddings))
    with Progress("quantising", max(options.levels, 1), "levels", quiet=options.json) as progress:
        found = quantise(
            embeddings,
            options.levels,
            options.codes,
            collisions=options.collisions,
            seed=options.seed,
            progress=lambda level: progress.update(),
        )
    form = TokenFormat(options.token_format, found.codebook_sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, _text(names, found.codes, form))
    levels = codebook_use(found.codes, found.codebook_sizes)
    for level, error in zip(levels, found.errors, strict=False):  # an extra level stands for no part of an embedding
        level["error"] = error
    report = {
        "out": str(out),
        "items": len(names),
        "codebook_sizes": list(found.codebook_sizes),
        "token_format": options.token_format,
        "collisions": options.collisions,
        "shared_before": found.shared_before,
        "shared_after": found.shared_after,
        "moved": found.moved,
        "distinct_sids": shared_sids(found.codes)["distinct"],
        "levels": levels,
    }
    print(json.dumps(report, indent=2) if options.json else _summary(report), flush=True)
    return 0


def _check_out(out: Path, options: argparse.Namespace) -> None:
    if out.suffix.lower() != ".json":
        raise ValueError(f"--out = {str(out)!r} ends in {out.suffix or 'no suffix'}; give a name that ends in .json")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out = {str(out)!r} is no file; give the name of one")
    if options.items is not None and out.exists() and Path(options.items).exists() and out.samefile(options.items):
        raise ValueError(f"--out = {str(out)!r} is the file of --items; give another name")


def _check_format(options: argparse.Namespace) -> None:
    """A template that is wrong, lacks letters or runs level and code into each other is found before the work."""
    from ..sid.formats import TokenFormat

    levels, codes = max(options.levels, 1) + (options.collisions == "extra-level"), max(options.codes, 1)
    form = TokenFormat(options.token_format, (codes,) * levels)
    for level in range(1, levels + 1):
        for code in (0, codes - 1):
            token = form.write(level, code)
            if form.read(token) != (level, code):
                raise ValueError(
                    f"--token-format = {form.template!r} writes level {level}, code {code} as {token}, which reads as "
                    f"level and code {form.read(token)}; put something between the fields"
                )


def _names(file: str | None, rows: int) -> list[str]:
    """Names of items from a JSON list or lines of text.

    Raises:
        ValueError: there are more or fewer than rows, or one is empty or there twice.
    """
    if file is None:
        return [str(row) for row in range(rows)]
    from .._files import read_json
    from .._inputs import check_unique, clipped, input_file, shown

    path = input_file("items", file, (".json", ".txt"))
    try:
        if path.suffix.lower() == ".json":
            found: Any = read_json(path, most=None)
            if not isinstance(found, list):
                raise ValueError(f"it holds a {type(found).__name__}; a list of names was expected")
        else:
            found = path.read_text(encoding="utf-8-sig").splitlines()
        for row, name in enumerate(found):
            if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
                raise ValueError(f"name {row} is {shown(name)}; a text or a whole number was expected")
        names = [str(name) for name in found]
        if len(names) != rows:
            raise ValueError(f"it has {len(names)} names, and the embeddings have {rows} rows; give one name a row")
        check_unique(names)
    except ValueError as error:
        raise ValueError(f"items {path}: {clipped(error)}") from None
    return names


def _text(names: list[str], codes: Any, form: TokenFormat) -> str:
    """The index as JSON, an item a line."""
    import json

    tokens: dict[tuple[int, int], str] = {}
    for level, column in enumerate(codes.unbind(1), 1):
        for code in column.unique().tolist():
            tokens[level, code] = form.write(level, code)
    lines = (
        f"{json.dumps(name)}: {json.dumps([tokens[level, code] for level, code in enumerate(sid, 1)])}"
        for name, sid in zip(names, codes.tolist(), strict=True)
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _summary(report: dict[str, Any]) -> str:
    from ..sid.formats import KNOWN_FORMATS

    lines = [f"{'level':>5}{'codes used':>16}{'perplexity':>12}{'most used':>11}{'error left':>12}"]
    for level in report["levels"]:
        used = f"{level['used']:,} of {level['size']:,}"
        error = f"{level['error']:>12.4f}" if "error" in level else f"{'-':>12}"
        lines.append(f"{level['level']:>5}{used:>16}{level['perplexity']:>12.1f}{level['most_used']:>11.1%}{error}")
    lines.append("error left: squared distance from the embeddings, as a share of that of their mean")
    lines.append(
        f"{report['items']:,} items; {report['shared_before']:,} shared their SID with another, "
        f"{report['shared_after']:,} do after --collisions {report['collisions']}"
        + (f"; {report['moved']:,} moved" if report["moved"] else "")
    )
    sizes = ",".join(map(str, report["codebook_sizes"]))
    given = "" if report["token_format"] in KNOWN_FORMATS[:-1] else f" --token-format '{report['token_format']}'"
    lines.append(f"written to {report['out']}; train with --items {report['out']} --codebook-sizes {sizes}{given}")
    return "\n".join(lines)
