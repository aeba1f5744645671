"""`prefixmem train`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import TYPE_CHECKING, Any

from .._progress import quiet_transformers

if TYPE_CHECKING:
    from ..recommender.training.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from ..recommender.training.run import train
    from ..recommender.training.session import is_first_process

    config = config_of(options)
    with quiet_transformers():
        report = train(config, options.out, resume=options.resume, quiet=options.json)
    if is_first_process():
        print(json.dumps(report, indent=2) if options.json else summary(report, options.out))
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    from ..recommender.training.config import add_flags

    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON with any of the options below; flags override it"
    )
    parser.add_argument(
        "--out", type=folder_name, required=True, metavar="FOLDER", help="a new or an empty folder for the run"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    add_flags(parser)


def folder_name(text: str) -> str:
    """The type of an argument that names a folder: an empty text would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder")
    return text


def config_of(options: argparse.Namespace, **defaults: Any) -> RunConfig:
    from ..recommender.training.config import CONFIG, config_from
    from ..recommender.training.folder import RunFolder

    check_libraries()
    if options.config == "":
        raise ValueError("--config = '' names no file")
    if not options.resume or options.config is not None:
        return config_from(options, options.config, **defaults)
    file = RunFolder.read(options.out).path / CONFIG
    if file.is_file():
        return config_from(options, file, **defaults)
    try:
        return config_from(options, None, **defaults)
    except ValueError as error:
        raise ValueError(f"{error}; the run was killed before it wrote its options: give all again") from None


def check_libraries(*others: str) -> None:
    """Raises ValueError where something that only training needs is not installed."""
    missing = [name for name in ("transformers", "accelerate", *others) if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed: pip install 'prefixmem_fast[train]'")


def summary(report: dict, out: str) -> str:
    """A line for each validation, and what was written."""
    rows = report["validation"]
    names = [name for name in rows[-1] if name.startswith("accuracy_")] if rows else []
    lines = [f"{'step':>8}{'loss':>9}" + "".join(f"{'level ' + name[9:]:>9}" for name in names)]
    lines += [f"{r['step']:>8}{r['loss']:>9.3f}" + "".join(f"{r[name]:>9.3f}" for name in names) for r in rows]
    size = report["parameters"]
    lines.append(
        f"{report['steps']} steps, {report['seconds']:.0f} s, {size['model']:,} parameters and {size['encoder']:,} of "
        f"the encoder; the model of step {report['model_step']} is in {out}"
    )
    return "\n".join(lines)
