"""Write the golden rows of a new version of the address spec from the integer oracle; those that exist never change."""

import json
import random
from pathlib import Path

import numpy as np

from prefixmem_fast import AddressSpec
from prefixmem_fast.addressing.spec import VERSIONS
from prefixmem_fast.checks import oracle

SPECS = {
    1: [
        {"codebook_sizes": (2048,) * 5},
        {"codebook_sizes": (2048,) * 5, "addressing": "hash", "active_levels": (3, 4)},
        {"codebook_sizes": (2048,) * 5, "mode": "suffix", "seed": 7},
        {"codebook_sizes": (2048,) * 5, "mode": "full", "table_rows": (1, 1, 500_000, 5_000_000)},
        {"codebook_sizes": (34, 149, 174, 256), "table_rows": 32_768, "heads": 2, "max_order": 3},
        {"codebook_sizes": (100_000, 70_000, 3), "table_rows": 1_000_003, "seed": 2**64 - 1},
        {"codebook_sizes": (256,) * 4, "table_rows": 2**33, "max_order": 6, "heads": 1},
    ],
    2: [
        {"codebook_sizes": (2048,) * 5, "history": 1},
        {"codebook_sizes": (256,) * 4, "history": 1, "heads": 2, "table_rows": 1_048_573, "active_levels": (0, 3)},
        {
            "codebook_sizes": (34, 149, 174, 256),
            "history": 2,
            "heads": 3,
            "table_rows": (12_101, 2**33, 7, 1),
            "seed": 7,
        },
        {"codebook_sizes": (100_000, 3), "history": 1, "table_rows": 2**40, "seed": 2**64 - 1},
        {"codebook_sizes": (5, 4), "history": 3, "heads": 1, "table_rows": 500},
        {"codebook_sizes": (300,), "history": 1},
    ],
}


def make(version):
    cases = []
    for number, arguments in enumerate(SPECS[version]):
        spec = AddressSpec(**arguments) if version == 1 else AddressSpec.cross_item(**arguments)
        rng = random.Random(number)
        codes = [[rng.randrange(size) for size in spec.window_sizes] for _ in range(3)]
        codes.append([size - 1 for size in spec.window_sizes])
        codes.append([0] * spec.levels)
        cut = min(2, spec.levels - 1)
        codes.append([*codes[0][:cut], -1, *codes[0][cut + 1 :]])
        rows = oracle.prefix_rows(np.array(codes), spec.to_dict())
        cases.append({"spec": spec.to_dict(), "codes": codes, "rows": rows.tolist()})
    return cases


if __name__ == "__main__":
    for version in VERSIONS:
        path = Path(__file__).with_name(f"rows_v{version}.json")
        if not path.exists():
            path.write_text("[\n" + ",\n".join(json.dumps(case) for case in make(version)) + "\n]\n")
