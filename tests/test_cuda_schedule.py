"""The replay of ptxas's schedules, on listings whose cycles can be counted by hand."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from cuda_schedule import cycles, loops

NONE = 7  # no scoreboard


def line(number, text, stall=1, sets=NONE, reads=NONE, waits=0):
    """An instruction as nvdisasm prints it, with its control bits."""
    control = stall << 41 | sets << 46 | reads << 49 | waits << 52
    return (
        f"        /*{16 * number:04x}*/                   {text} ;   /* 0x{number:016x} */\n"
        + " " * 60
        + (f"/* 0x{control:016x} */\n")
    )


def listing(*body):
    head = '\n\t.section\t.text.kernel_of_tests,"ax",@progbits\n.text.kernel_of_tests:\n'
    return head + line(90, "MOV R1, R2") + ".L_x_0:\n" + "".join(body) + line(91, "EXIT")


def jump(number, stall=1):
    return line(number, "@P0 BRA `(.L_x_0)", stall)


def of(*body):
    (loop,) = loops(listing(*body))
    return loop


def test_a_loop_without_waits_takes_its_stalls():
    loop = of(line(1, "IADD3 R1, R1, 0x1, RZ", stall=4), line(2, "MOV R3, R1", stall=6), jump(3, stall=5))
    assert loop.kernel == "kernel_of_tests" and [i.name for i in loop.body] == ["IADD3", "MOV", "BRA"]
    assert cycles(loop.body, 1, 100) == 15
    assert cycles(loop.body, 1, 500) == 15


def test_a_value_that_is_awaited_costs_its_latency_once_however_many_are_loaded():
    chain = of(
        line(1, "LDG.E R1, [R2]", sets=0),
        line(2, "FADD R1, R1, R1", waits=1),
        line(3, "LDG.E R3, [R2+0x4]", sets=1),
        line(4, "FADD R3, R3, R3", waits=2),
        jump(5),
    )
    together = of(
        line(1, "LDG.E R1, [R2]", sets=0),
        line(2, "LDG.E R3, [R2+0x4]", sets=1),
        line(3, "FADD R1, R1, R1", waits=1),
        line(4, "FADD R3, R3, R3", waits=2),
        jump(5),
    )
    assert chain.count("LDG") == together.count("LDG") == 2
    assert cycles(chain.body, 1, 300) - cycles(together.body, 1, 300) == pytest.approx(300, abs=5)
    # Two warps wait at the same time.
    assert cycles(chain.body, 2, 300) == pytest.approx(cycles(chain.body, 1, 300), abs=5)


def test_warps_share_the_pipes():
    loop = of(*(line(number, "DADD R2, R2, R4") for number in range(1, 21)), jump(21))
    one, four = cycles(loop.body, 1, 100), cycles(loop.body, 4, 100)
    assert one == pytest.approx(40, abs=2) and four == pytest.approx(160, abs=4)


def test_a_loop_inside_another_is_left_out_of_it():
    inner = ".L_x_1:\n" + line(2, "POPC R1, R2") + line(3, "@P1 BRA `(.L_x_1)")
    found = {tuple(i.name for i in loop.body) for loop in loops(listing(line(1, "MOV R1, R2"), inner, jump(4)))}
    assert found == {("POPC", "BRA"), ("MOV", "BRA")}


def test_a_jump_forward_is_no_loop():
    assert not list(loops(listing(line(1, "@P0 BRA `(.L_x_9)"), ".L_x_9:\n", line(2, "MOV R1, R2"))))
