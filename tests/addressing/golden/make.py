"""Write the golden rows of a new version of the address spec from the integer oracle; those that exist never change."""

import json
import random
from pathlib import Path

import numpy as np

from prefixmem_fast import AddressSpec
from prefixmem_fast.addressing.spec import VERSION
from prefixmem_fast.checks import oracle

SPECS = [
    {"codebook_sizes": (2048,) * 5},
    {"codebook_sizes": (2048,) * 5, "addressing": "hash", "active_levels": (3, 4)},
    {"codebook_sizes": (2048,) * 5, "mode": "suffix", "seed": 7},
    {"codebook_sizes": (2048,) * 5, "mode": "full", "table_rows": (1, 1, 500_000, 5_000_000)},
    {"codebook_sizes": (34, 149, 174, 256), "table_rows": 32_768, "heads": 2, "max_order": 3},
    {"codebook_sizes": (100_000, 70_000, 3), "table_rows": 1_000_003, "seed": 2**64 - 1},
    {"codebook_sizes": (256,) * 4, "table_rows": 2**33, "max_order": 6, "heads": 1},
]


def make():
    cases = []
    for number, arguments in enumerate(SPECS):
        spec = AddressSpec(**arguments)
        rng = random.Random(number)
        codes = [[rng.randrange(size) for size in spec.codebook_sizes] for _ in range(3)]
        codes.append([size - 1 for size in spec.codebook_sizes])
        codes.append([0] * spec.levels)
        codes.append([*codes[0][:2], -1, *codes[0][3:]])
        rows = oracle.prefix_rows(np.array(codes), spec.to_dict())
        cases.append({"spec": spec.to_dict(), "codes": codes, "rows": rows.tolist()})
    return cases


if __name__ == "__main__":
    path = Path(__file__).with_name(f"rows_v{VERSION}.json")
    if path.exists():
        raise SystemExit(f"{path.name} exists, and the rows of a version never change; raise spec.VERSION first")
    path.write_text("[\n" + ",\n".join(json.dumps(case) for case in make()) + "\n]\n")
