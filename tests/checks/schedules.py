"""What a kernel's schedule must hold, and which of it a row of `prefixmem verify --compile --json` breaks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Least and most; None sets none. The names are those of a row and of its schedule, or of what they count."""

    least_rows_at_first_wait: int | None = None
    least_row_bytes_in_flight: int | None = None  # a multiprocessor: 16 KB is what an H100 needs, 23 KB an H200
    least_resident_warps: int | None = None
    most_program_rounds: int | None = None
    most_rounds: int | None = None  # of a turn
    most_rows_waited_for_at_once: int | None = None
    most_barriers_in_loops: int | None = None
    most_shared_accesses_in_loops: int | None = None
    most_instructions: int | None = None
    most_instructions_a_sid: float | None = None


def broken(row: dict, limits: Limits) -> list[str]:
    """Each limit that a row breaks, in words."""
    found = {**row["schedule"], **{key: row[key] for key in ("row_bytes_in_flight", "resident_warps")}}
    found["instructions_a_sid"] = row["instructions_a_sid"]
    words = []
    for name, limit in vars(limits).items():
        side, _, what = name.partition("_")
        if limit is not None and (found[what] < limit if side == "least" else found[what] > limit):
            words.append(f"{row['kernel']}: {what} {found[what]}, at {side} {limit}")
    return words


def unreached(rows: list[dict]) -> list[str]:
    """Kernels whose loop the timeline missed: their figures would mean nothing."""
    return [row["kernel"] for row in rows if row["schedule"] is not None and row["schedule"]["turn_instructions"] == 0]
