"""`prefixmem tune`."""

from __future__ import annotations

import argparse
import json

from .._progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=float, default=120, help="start no further measurement after so many (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    from ..kernels.settings import DEFAULTS, check_store, off, settings_for, store

    if not options.seconds > 0:
        raise ValueError(f"--seconds = {options.seconds}; give more than 0")
    why = _no_gpu()
    if why is not None:
        return _print(options, DEFAULTS, [], {"not measured": why})
    import torch

    from ..checks.tuning import DeviceClock, combinations, trials, works_on

    gpu, found = torch.cuda.get_device_name(), []
    check_store(gpu)
    chosen = settings_for(gpu)
    total = sum(map(len, combinations().values()))
    with Progress("tune", total, "combinations", quiet=options.json) as progress:
        for trial, settings in trials(works_on("cuda"), DeviceClock(), options.seconds, chosen):
            found.append(trial)
            chosen = settings
            progress.update(kernels=trial.of)
    if all(trial.microseconds is None for trial in found):
        raise ValueError(f"nothing was measured and nothing is kept: {found[-1].note}; give more --seconds")
    head = {"gpu": gpu, "file": str(store(gpu, chosen))}
    if off():
        head["not in force"] = "PREFIXMEM_TUNE=off is set"
    return _print(options, chosen, found, head)


def _no_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    import torch

    from .._triton import TRITON_PROBLEM, interpreting

    if interpreting():
        return "TRITON_INTERPRET=1 is set, so Triton interprets; unset it"
    return TRITON_PROBLEM or (None if torch.cuda.is_available() else "torch finds no GPU")


def _print(options: argparse.Namespace, chosen, trials: list, head: dict[str, str]) -> int:
    from ..kernels.settings import SETTINGS

    if options.json:
        print(
            json.dumps(
                {**head, "settings": chosen._asdict(), "trials": [trial._asdict() for trial in trials]}, indent=2
            )
        )
        return 0
    for name, value in head.items():
        print(f"{name}: {value}")
    for trial in trials:
        values = ", ".join(f"{name} {value}" for name, value in trial.values.items())
        print(f"{trial.of:<10}{values:<42}{trial.note or f'{trial.microseconds:9.1f} us'}")
    for (name, setting), value in zip(SETTINGS.items(), chosen, strict=True):
        of_default = setting.reason if value == setting.default else f"measured; default {setting.default}"
        print(f"{name:<16}{value:>6}  {of_default}")
    return 0
