"""Occupancy, and the arithmetic of the model."""

import math

import pytest

from prefixmem_fast.checks.common_path import accesses_on, common_path, turns_of
from prefixmem_fast.checks.occupancy import CARDS, resident_programs
from prefixmem_fast.checks.prediction import LAUNCH_US, OPERATIONS, SIDS, floor_bytes, launch_us, sort_us
from prefixmem_fast.checks.schedule import Cost

from .sass_text import EXIT, ORDER, ROW, instruction, load, program, use


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [
        (32, 0, 4, 16),  # all 64 warps
        (44, 0, 4, 10),  # 48 registers a thread: 10 warps in each quarter
        (186, 0, 2, 4),  # 192: a quarter holds two warps, though ten would fit the registers as a whole
        (168, 0, 1, 12),
        (255, 0, 4, 2),
        (32, 48 << 10, 4, 4),  # 49 KB a program
        (16, 0, 1, 32),  # programs
    ],
)
def test_occupancy_on_sm_90(registers, shared, warps, programs):
    assert resident_programs("sm_90", registers, shared, warps) == programs


def test_occupancy_is_not_told_elsewhere():
    assert resident_programs("gfx942", 64, 0, 4) is None


def test_bytes_that_must_be_in_flight():
    assert CARDS["H100"].bytes_needed_in_flight == pytest.approx(15.9e3, rel=0.01)
    assert CARDS["H200"].bytes_needed_in_flight == pytest.approx(22.8e3, rel=0.01)


def test_a_launch_is_bound_by_latency_issue_or_bytes():
    card = CARDS["H100"]
    full = 132 * 8
    kernel = {"cycles": 17_550, "instructions": 100, "row_bytes": 0, "warps": 1, "resident": 8}
    assert launch_us(card, full, Cost(**kernel)) == pytest.approx(LAUNCH_US + 10)
    assert launch_us(card, 1, Cost(**kernel)) == pytest.approx(LAUNCH_US + 10)
    assert launch_us(card, full + 1, Cost(**kernel)) == pytest.approx(LAUNCH_US + 20)  # a second wave
    issue = Cost(**{**kernel, "instructions": 17_550})
    assert launch_us(card, full, issue) == pytest.approx(LAUNCH_US + 20)
    moved = Cost(**{**kernel, "row_bytes": 1 << 20})
    assert launch_us(card, full, moved) == pytest.approx(LAUNCH_US + full * (1 << 20) / (0.9 * 2900e3))


def test_sorts():
    assert sort_us(1024, "int64") == 15
    assert sort_us(65_536, "int64") == 8 + 8 * 5
    assert sort_us(65_536, "int32") == 8 + 4 * 5
    assert sort_us(12 << 20, "int32") == pytest.approx(8 + 4 * 2 * 12 * (12 << 20) / 2e6)


def test_floors():
    """3 orders of 4 rows of 128 bytes a SID, 2 vectors of 512, 40 bytes of codes; 2048 rows of order 1 in all."""
    sids = 1 << 20
    assert floor_bytes("forward", sids) / sids == pytest.approx(40 + 3 * 512 + 1024, abs=1)
    assert floor_bytes("token forward", sids) / sids == pytest.approx(40 + 3 * 512 + 5 * 512, abs=1)
    assert floor_bytes("backward + update", sids) / sids == pytest.approx(40 + 52 + 1024 + 12 * 2 * 132, abs=3)
    assert floor_bytes("forward", 1024) == 1024 * (40 + 4 * 512 + 1024)
    assert set(OPERATIONS) >= {"forward", "token forward", "backward + update"}
    assert SIDS[0] == 1024


def test_common_paths():
    """A path masks pointers by name, or a share of their accesses in the order of the code."""
    code = program(*(load(8, sets=0, line=ROW) for _ in range(8)), load(2, sets=0, line=ORDER, width=".64"), EXIT)
    names = dict.fromkeys(range(8), "p_weight") | {8: "p_codes"}
    forward = accesses_on(common_path("prefix_memory_fwd"), code, names, {})
    assert (forward.masked, forward.from_dram) == (frozenset(), dict.fromkeys(range(8), 3 / 4))
    names = dict.fromkeys(range(4), "destination.table") | {
        4: "p_aside",
        5: "p_edges",
        6: "p_aside|p_edges",
        8: "p_grad",
    }
    walk = accesses_on(common_path("sum_prefixes"), code, names, {})
    assert walk.masked == {4, 5, 6}
    edges = accesses_on(common_path("sum_edges"), code, names, {})
    assert edges.masked == {0, 1, 2, 3}


def test_a_kernel_that_no_path_names_is_walked_straight_through():
    assert common_path("a_new_kernel") is None
    assert accesses_on(None, program(EXIT), {}, {}).masked == frozenset()


def test_turns_of_the_largest_loop():
    code = program("L_x_0", use(), use(), instruction("@P0 BRA `(.L_x_0)"), EXIT)
    (loop,) = code.loops
    assert turns_of(None, code, {"BLOCK": 32}) == {loop: 32}
    assert turns_of(None, code, {"BLOCK": 32, "E": 8}) == {loop: 8}
    assert turns_of(None, code, {}) == {loop: 1}
    merge = common_path("merge_rows")
    shared = 12 * 65_536 * (1 - math.exp(-65_536 / 2e6) + 1 / 43) + 4 * 2048
    turns = turns_of(merge, code, {"S": 16 * 65_536, "programs": 1000, "BM": 4})
    assert turns == {loop: math.ceil(shared / 4000)}
    assert turns_of(common_path("sum_edges"), code, {"BLOCK": 32}) == {loop: 1}
    assert turns_of(None, program(EXIT), {"BLOCK": 32}) == {}
