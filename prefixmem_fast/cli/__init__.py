"""The `prefixmem` command. Exit codes: 0 done, 1 a check failed, 2 bad input, with one line that says what to do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..operation.backends import BackendError
from . import bench, demo, evaluate, info, pretrain, train, verify

COMMANDS = {
    "info": info,
    "verify": verify,
    "bench": bench,
    "pretrain": pretrain,
    "train": train,
    "evaluate": evaluate,
    "demo": demo,
}


def parser_of() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="prefixmem", description="PrefixMem: memory for Semantic IDs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        summary = module.__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if module is not bench:  # its actions have their own
            command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser_of().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError, BackendError) as error:
        print(f"prefixmem {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"prefixmem {options.command}: interrupted", file=sys.stderr)
        return 130
