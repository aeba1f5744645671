"""`prefixmem info`."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    from ..checks.environment import facts

    machine = facts()
    if options.json:
        print(json.dumps(machine, indent=2))
        return 0
    for name, value in machine["versions"].items():
        tested = machine["tested"].get(name)
        print(f"{name:<18}{value:<18}{'tested with ' + ', '.join(tested) if tested else ''}".rstrip())
    for gpu in machine["gpus"]:
        print(f"{'gpu':<18}{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}, driver {gpu['driver']}")
    if not machine["gpus"]:
        print(f"{'gpu':<18}none that torch can use")
    for gpu, settings in machine["settings"].items() or [("", {"from": "defaults"})]:
        source, values = settings.pop("from"), ", ".join(f"{name} {value}" for name, value in settings.items())
        print(f"{'settings':<18}{': '.join(filter(None, (gpu, source, values)))}")
    for backend, problem in machine["backends"].items():
        print(f"{'backend ' + backend:<18}{'available' if problem is None else 'not available: ' + problem}")
    return 0
