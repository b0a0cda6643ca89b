"""The model of a multiprocessor, on loops whose clocks follow from its rules."""

from __future__ import annotations

import pytest

from tests.kernels.multiprocessor import COUNTERS, Costs, Issued, Multiprocessor, loop_of

NONE = COUNTERS + 1


def issued(opcode: str, stall: int = 1, sets: int = NONE, waits: int = 0) -> Issued:
    return Issued(opcode, stall, sets, NONE, waits, None)


def clocks(loop: list[Issued], warps: int = 4, **wavefronts: float) -> float:
    return Multiprocessor(loop, warps, wavefronts).clocks()


def test_a_scheduler_issues_one_instruction_a_clock() -> None:
    loop = [issued("FFMA") for _ in range(32)]
    assert clocks(loop, warps=4) == pytest.approx(32 / 4)
    assert clocks(loop, warps=8) == pytest.approx(32 / 4)


def test_integers_take_two_clocks_and_floats_beside_them_none() -> None:
    integers = [issued("IADD3") for _ in range(16)]
    mixed = [issued(opcode) for _ in range(16) for opcode in ("IADD3", "FFMA")]
    assert clocks(integers, warps=8) == clocks(mixed, warps=8) == pytest.approx(32 / 4)


def test_stalls_are_filled_by_other_warps() -> None:
    loop = [issued("FFMA", stall=8) for _ in range(8)]
    assert clocks(loop, warps=4) == pytest.approx(64 / 4)
    assert clocks(loop, warps=16) == pytest.approx(64 / 16)


def test_a_warp_waits_for_what_it_has_asked_for() -> None:
    loop = [issued("LDS", sets=0), issued("FFMA", waits=1)]
    # Alone on its scheduler: to the way there, through it, and back.
    alone = clocks(loop, warps=1)
    assert alone >= Costs().latency
    assert clocks(loop, warps=4) < alone / 3


def test_wavefronts_take_turns() -> None:
    loop = [issued("LDS") for _ in range(64)]
    assert clocks(loop, warps=8, LDS=1.0) == pytest.approx(64, rel=0.02)
    assert clocks(loop, warps=8, LDS=3.0) == pytest.approx(3 * 64, rel=0.02)


@pytest.mark.parametrize(
    "opcode, clocks_each", [("HMMA", Costs().product), ("MUFU.EX2", 8), ("IMAD", 2), ("IDP.4A", 2)]
)
def test_units_are_busy_for_a_while(opcode: str, clocks_each: int) -> None:
    loop = [issued(opcode) for _ in range(8)]
    assert clocks(loop, warps=8) == pytest.approx(8 * clocks_each / 4, rel=0.02)


def test_transpositions_share_the_way_with_look_ups() -> None:
    loop = [issued(opcode) for _ in range(32) for opcode in ("LDS", "MOVM")]
    expected = 32 * (1 + Costs().transposition)
    assert clocks(loop, warps=8) == pytest.approx(expected, rel=0.02)


def test_one_scheduler_issues_memory_instructions_at_a_distance() -> None:
    loop = [issued("LDS") for _ in range(32)]
    assert clocks(loop, warps=1) == pytest.approx(32 * Costs().between, rel=0.02)


def test_operands_are_read_before_they_are_written_again() -> None:
    reads = Issued("IADD3", 1, NONE, 2, 0, None)
    loop = [reads, issued("FFMA", waits=1 << 2)]
    assert clocks(loop, warps=1) == pytest.approx(Costs().operands + 1)


def listing(*lines: str) -> str:
    """As nvdisasm prints instructions, each with its control bits: stall, sets, frees, waits."""
    text = []
    for number, line in enumerate(lines):
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, *control = line.split("|")
        stall, sets, frees, waits = map(int, control)
        bits = (stall | sets << 5 | frees << 8 | waits << 11) << 41
        text.append(f"        /*{16 * number:04x}*/   {instruction};  /* 0x{number:016x} */")
        text.append(f"        /* 0x{bits:016x} */")
    return "\n".join(text)


def test_a_listing_is_read_with_what_the_compiler_says() -> None:
    text = listing(
        "MOV R1, R2 |1|7|7|0",
        ".L_x_1:",
        "LDS R3, [R4+0x10] |2|3|1|0",
        "@P0 BRA `(.L_x_2) |5|7|7|0",
        "FMNMX R5, R6, R7, PT |4|7|7|0",
        ".L_x_2:",
        "HMMA.16816.F32 R8, R8, R3, R8 |6|7|7|8",
        "@!P1 BRA `(.L_x_1) |5|7|7|0",
        "EXIT |5|7|7|0",
    )
    loop = loop_of(text)
    assert [each.opcode for each in loop] == ["LDS", "BRA", "HMMA.16816.F32", "BRA"]
    load, _, product, _ = loop
    assert (load.stall, load.sets, load.frees, load.waits) == (2, 3, 1, 0)
    assert (product.stall, product.waits) == (6, 1 << 3)
    # What reads codes or multiplies is not skipped.
    for kept in ("LDG.E.NA R5, desc[UR4][R6.64]", "HMMA.16816.F32 R9, R9, R3, R9"):
        assert len(loop_of(text.replace("FMNMX R5, R6, R7, PT", kept))) == 5


def test_warps_wait_for_each_other_at_a_barrier() -> None:
    loop = [issued("BAR"), *(issued("FFMA", stall=4) for _ in range(16))]
    every = Multiprocessor(loop, 8, barrier_every=1).clocks()
    seldom = Multiprocessor(loop, 8, barrier_every=4).clocks()
    assert 16 * 4 / 8 <= seldom < every
