"""The timeline on machine code by hand: loads that the code takes one after another must show."""

import pytest

from prefixmem_fast.checks.pointers import class_of, is_known
from prefixmem_fast.checks.timeline import LATENCY, ROUND, Accesses, row_bytes, skipped_branches, walk

from .sass_text import EXIT, ORDER, ROW, STORE, instruction, load, pointers, program, use


def walked(code, masked=frozenset(), turns=None):
    return walk(code, accesses_of(code, masked), turns)


def accesses_of(code, masked=frozenset()):
    found = pointers()
    touched = {k: found.of(i) for k, i in enumerate(code.instructions) if i.loads_global or i.stores_global}
    return Accesses(touched, frozenset(masked))


def in_parallel(rows=4):
    return program(*(load(8 + 4 * k, sets=k % 2, line=ROW) for k in range(rows)), use(0, 1), EXIT)


def one_by_one(rows=4):
    return program(*(part for k in range(rows) for part in (load(8 + 4 * k, sets=0, line=ROW), use(0))), EXIT)


def loop(*body):
    return program("L_x_0", *body, instruction("@P0 BRA `(.L_x_0)"), EXIT)


def ahead():
    """A turn waits first for the rows of the turn before, then loads those of the next."""
    return loop(use(0), load(8, sets=0, line=ROW), load(12, sets=0, line=ROW))


def at_once():
    return loop(load(8, sets=0, line=ROW), load(12, sets=0, line=ROW), use(0))


def test_control_bits_are_read():
    code = program(load(8, sets=3, line=ROW, stall=5, reads=2, waits=(0, 5)), use(3), EXIT)
    first = code.instructions[0]
    assert (first.stall, first.sets, first.sets_when_read, first.waits) == (5, 3, 2, (0, 5))
    assert (first.name, first.bytes_a_thread, first.source) == ("LDG", 16, (("/kernels/some.py", ROW),))
    assert [i.waits for i in code.instructions] == [(0, 5), (3,), ()]


@pytest.mark.parametrize(
    ("text", "name", "width"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10]", "LDG", 16),
        ("@!P0 LDG.E.U16 R4, desc[UR4][R2.64]", "LDG", 2),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64]", "LDG", 32),
        ("@P1 STG.E desc[UR4][R2.64], R4", "STG", 4),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4", "REDG", 16),
        ("RED.E.ADD.F64.RN.STRONG.GPU desc[UR4][R2.64], R4", "RED", 8),
    ],
)
def test_names_and_widths(text, name, width):
    (found,) = program(instruction(text)).instructions
    assert (found.name, found.bytes_a_thread) == (name, width)


def test_padding_and_the_trap_behind_the_exit_are_no_code():
    code = program(use(), EXIT, "L_x_9", instruction("BRA `(.L_x_9)"), instruction("NOP"))
    assert len(code) == 2
    assert code.loops == []


def test_rows_loaded_before_the_first_sum_are_one_round():
    code = in_parallel()
    whole = walked(code).whole
    assert whole.rounds == 1
    assert whole.loads_at_first_wait == 4
    rows = whole.rows_at_first_wait(accesses_of(code))
    assert row_bytes(code, rows) == 4 * 32 * 16
    assert whole.cycles < LATENCY["rows"] + 20


def test_rows_loaded_one_by_one_are_a_round_each():
    code = one_by_one()
    whole = walked(code).whole
    assert whole.rounds == 4
    assert len(whole.rows_at_first_wait(accesses_of(code))) == 1
    assert whole.cycles >= 4 * LATENCY["rows"]


def test_stalls_pass_time():
    assert walked(program(use(stall=9), use(stall=4), EXIT)).whole.cycles == 9 + 4 + 1


def test_a_wait_for_the_order_is_not_a_wait_for_rows():
    code = program(load(2, sets=0, line=ORDER, width=".64"), use(0), load(8, sets=1, line=ROW), use(1), EXIT)
    accesses = accesses_of(code)
    assert [accesses.kind(0), accesses.kind(2)] == ["stream", "rows"]
    whole = walked(code).whole
    assert whole.loads_at_first_wait == 1
    assert whole.rows_at_first_wait(accesses) == [2]
    assert whole.rounds == 1
    assert LATENCY["stream"] < ROUND


def test_a_later_load_of_a_line_is_a_hit():
    two = program(*(part for _ in range(2) for part in (load(2, sets=0, line=ORDER, width=".64"), use(0))), EXIT)
    assert LATENCY["stream"] + 40 <= walked(two).whole.cycles < 2 * LATENCY["stream"]


def test_rows_waited_for_in_the_turn_that_loads_them():
    assert walked(at_once()).steady.rows_waited_for_at_once == 2
    assert walked(ahead()).steady.rows_waited_for_at_once == 0


def test_a_turn_ahead_hides_what_the_turn_takes():
    """Work between the load and its wait, which stands in the next turn, shortens the wait."""
    body = (use(0), load(8, sets=0, line=ROW), *(use(stall=15) for _ in range(100)))
    steady = walked(loop(*body)).steady
    assert steady.rounds == 0
    assert steady.cycles == pytest.approx(1500, rel=0.1)


def test_a_scoreboard_of_both_turns_is_a_wait_in_the_turn():
    """Rows of the next turn and this turn's order on one scoreboard: the wait for the one is a wait for the other."""
    shared = loop(use(0), load(8, sets=0, line=ROW), load(2, sets=0, line=ORDER, width=".64"), use(0))
    assert walked(shared).steady.rows_waited_for_at_once == 1


def test_a_turn_is_walked_as_often_as_asked():
    code = loop(use(stall=10))
    (body,) = code.loops
    assert walked(code, turns={body: 32}).whole.cycles == 32 * 11 + 1
    assert walked(code, turns={}).whole.instructions == 3
    assert walked(code).steady.instructions == 2


def test_barriers_and_shared_memory_count_in_loops_alone():
    outside = (instruction("BAR.SYNC.DEFER_BLOCKING 0x0"), instruction("STS [R1], R2"))
    code = program(*outside, "L_x_0", *outside, instruction("LDS R2, [R1]"), instruction("@P0 BRA `(.L_x_0)"), EXIT)
    assert code.in_loops("BAR") == 1
    assert code.in_loops("STS", "LDS") == 2


def test_masked_loads_take_no_time():
    code = one_by_one(2)
    assert walked(code, masked={0}).whole.rounds == 1
    assert walked(code, masked={0}).whole.row_bytes == 32 * 16


def test_counted_waits():
    """DEPBAR.LE SB0, 0x1 leaves the last load on its way."""
    first, last = load(8, sets=0, line=ROW, stall=15), load(12, sets=0, line=ROW)
    waits = [
        walked(program(first, *[use(stall=15)] * 20, last, instruction(f"DEPBAR.LE SB0, 0x{left}"), EXIT)).whole.cycles
        for left in (0, 1)
    ]
    assert waits[1] < LATENCY["rows"] + 20 < waits[0]


def branches(*block, target="L_x_1"):
    return program(instruction(f"@P0 BRA `(.{target})"), *block, "L_x_1", use(), EXIT)


def test_the_common_path_goes_around_calls_exits_and_masked_accesses():
    store = instruction("STG.E.128 desc[UR4][R2.64], R8", line=STORE)
    assert skipped_branches(branches(instruction("CALL.REL.NOINC `(.L_y)")), frozenset()) == {0}
    assert skipped_branches(branches(instruction("EXIT")), frozenset()) == {0}
    assert skipped_branches(branches(store), frozenset()) == set()
    assert skipped_branches(branches(store), frozenset({1})) == {0}
    assert skipped_branches(branches(use()), frozenset()) == set()


def test_the_common_path_enters_loops():
    """A guard either falls through into a loop, or leads to one that is jumped over else."""
    body = ("L_x_0", use(), instruction("@P1 BRA `(.L_x_0)"))
    falls = program(instruction("@P0 BRA `(.L_x_1)"), *body, instruction("CALL.REL.NOINC `(.L_y)"), "L_x_1", EXIT)
    leads = program(
        instruction("@P0 BRA `(.L_x_2)"), instruction("BRA `(.L_x_1)"), "L_x_2", use(), *body, "L_x_1", EXIT
    )
    for code in (falls, leads):
        assert walked(code).steady.instructions == 2


def test_pointers_come_from_ptx():
    """A value that was loaded ends the way back: the row's address leads to the table, not to the order."""
    found = pointers()
    row, order = program(load(8, sets=0, line=ROW), load(2, sets=0, line=ORDER, width=".64"), EXIT).instructions[:2]
    assert (found.of(row), found.of(order)) == ("p_weight", "p_order")
    store, elsewhere = program(
        instruction("STG.E.128 desc[UR4][R2.64], R8", line=STORE), load(8, sets=0, line=99), EXIT
    ).instructions[:2]
    assert (found.of(store), found.of(elsewhere)) == ("p_weight", None)


def test_a_pointer_that_is_not_known_counts_as_the_slowest():
    assert (class_of("p_new"), is_known("p_new")) == ("rows", False)
    assert (class_of(None), is_known(None)) == ("rows", False)
    assert (class_of("p_order|p_targets"), is_known("p_order|p_targets")) == ("line", True)
    assert class_of("p_order|p_new") == "rows"
