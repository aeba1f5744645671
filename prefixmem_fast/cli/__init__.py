"""The `prefixmem` command.

Exit codes: 0 done; 1 a check failed or a run diverged; 2 bad input, with one line that says what to do; 130
interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .._inputs import clipped
from .._progress import say
from .._version import __version__

COMMANDS = {
    "info": "Show versions, those tested, the GPU, and which backends can run and why the others cannot.",
    "verify": "Check every backend against the reference, or prove without a GPU what the kernels compile to and move.",
    "tune": "Measure block sizes and warps of the kernels on this GPU, and keep the fastest for later processes.",
    "plan": "Say how to place the tables on a number of GPUs: what fits, what a rank sends for a Semantic ID, and why.",
    "bench": "Measure the kernels on this machine beside plain PyTorch and other libraries, report and compare.",
    "index": "Make Semantic IDs from embeddings of items, by residual quantisation, and write them as an index.",
    "inspect": "Show what an index holds before training: codebooks, prefixes, shared SIDs, rows that prefixes share.",
    "pretrain": "Pre-train an encoder alone: by a classification head, or in a small Tiger or causal LM.",
    "train": "Train a recommender on Semantic IDs: any causal LM or T5 of transformers, with the encoder or without.",
    "evaluate": "Evaluate a trained run: TF-L by level, recall, NDCG and hit rates by beam search, beside counting.",
    "serve": "Answer over HTTP which items come next after a history, and show the search on a page.",
    "demo": "The whole path on a synthetic catalogue: pre-train, train with and without the encoder, evaluate, draw.",
}
_OF_WRITING = ("writ", "serializ", "No space", "Writer")
_EPILOG = "PREFIXMEM_TRACEBACK=1 in the environment shows where in the code an error was raised."


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the list of all arguments."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the arguments\n")


def parser_of(commands: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of the command line, with the arguments of `commands`; a command is imported for its own alone."""
    parser = _Parser(
        prog="prefixmem", description="PrefixMem: memory for Semantic IDs.", epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, summary in COMMANDS.items():
        command = parsers.add_parser(name, help=summary, description=summary, epilog=_EPILOG, allow_abbrev=False)
        if name not in commands:
            continue
        if name != "bench":  # its actions have their own
            command.add_argument("--json", action="store_true", help="print one JSON object for machines")
        _module(name).add_arguments(command)
    parser.commands = parsers.choices
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a locale may lack letters of a name
    options = _parse([*map(str, sys.argv[1:] if arguments is None else arguments)])
    said = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: _say(options.command, f"warning: {message}")
    try:
        code = _module(options.command).run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        goes_on = "; the same command with --resume goes on" if hasattr(options, "resume") else ""
        _say(options.command, f"interrupted{goes_on}")
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        code, text = _told(error)
        if code is None or os.environ.get("PREFIXMEM_TRACEBACK"):
            raise
        _say(options.command, text)
        return code
    finally:
        warnings.showwarning = said


def _module(command: str):
    return import_module(f".{command}", __name__)


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = next((argument for argument in arguments[:1] if argument in COMMANDS), None)
    parser = parser_of([command] if command else ())
    if command and command != "bench":  # before argparse asks for what is missing
        flags = {flag for action in parser.commands[command]._actions for flag in action.option_strings}
        for argument in arguments[1:]:
            flag = argument.split("=")[0]
            if flag.startswith("--") and flag not in flags:
                near = difflib.get_close_matches(flag, flags, n=1)
                parser.commands[command].error(f"{flag} is unknown" + (f", {near[0]} is near" if near else ""))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.commands[options.command].error(f"{unknown[0]} is unknown")
    return options


def _say(command: str, text: str) -> None:
    say(f"prefixmem {command}: {clipped(text, 2000)}")


def _told(error: Exception) -> tuple[int | None, str]:
    """Exit code and message of an error of input or of the machine; None for one of the program."""
    from ..operation import BackendError

    text = str(error)
    if isinstance(error, ArithmeticError) and type(error).__module__.startswith(__package__.partition(".")[0]):
        return 1, text
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 2, _disk_full(text)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_out_of_memory(text)):
        return 2, f"out of memory: {text or 'an array does not fit'}; give smaller tables (table_rows) or batches"
    if "SafetensorError" in type(error).__name__ or (isinstance(error, RuntimeError) and _is_of_a_file(text)):
        return 2, _disk_full(text) if any(word in text for word in _OF_WRITING) else text
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # of Path.resolve
        return 2, f"{text}; give another folder"
    if isinstance(error, (ValueError, TypeError, OSError, NotImplementedError, RecursionError, BackendError)):
        return 2, text or type(error).__name__
    return None, text


def _disk_full(text: str) -> str:
    return f"a file could not be written whole: {text}; make room on the disk, or give another folder"


def _is_of_a_file(text: str) -> bool:
    """Whether an error is of torch.save or torch.load."""
    return any(word in text for word in ("PytorchStream", "PyTorchFile", "inline_container"))


def _is_out_of_memory(text: str) -> bool:
    return "out of memory" in text.lower() or "can't allocate memory" in text
