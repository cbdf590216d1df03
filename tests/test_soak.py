"""A minute of tests/soak.py: random faults of a seed that the output names; QCOMM_SOAK_SEED gives it again."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import soak
import soak_cases
import soak_worlds
from soak_cases import Case, Observed, Report, StepReport, blamed, draw, judge

ROOT = Path(__file__).parents[1]
LEAST_REACHED = 5  # in a minute of a busy machine; it is mostly 40


@pytest.mark.world
@pytest.mark.slow
def test_a_minute_of_random_faults():
    seed = os.environ.get("QCOMM_SOAK_SEED")
    command = [sys.executable, "tests/soak.py", "--seconds", "60", *([] if seed is None else ["--seed", seed])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "; 0 violations; " in ended.stdout
    (reached,) = re.findall(r"^\d+ faults, (\d+) of them reached, ", ended.stdout, re.MULTILINE)
    assert int(reached) >= LEAST_REACHED, ended.stdout


class Idle:
    """Stands for the processes of a soak: ranks that pass no point at which a fault begins."""

    def __init__(self, *_):
        pass

    def run(self, case):
        return Observed([report(("a", None)) for _ in range(case.world_size)]), "", None, ""

    def close(self):
        return []


@pytest.fixture
def idle_soak(monkeypatch):
    monkeypatch.setattr(soak, "Template", Idle)
    monkeypatch.setattr(soak, "Pool", Idle)
    monkeypatch.setattr(soak, "available_transports", lambda: (["gloo"], []))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    options = {
        "seed": 1,
        "faults": 3,
        "only": None,
        "seconds": None,
        "timeout": 4.0,
        "jobs": 2,
        "json": None,
        "transports": None,
        "kinds": None,
    }
    return Namespace(**options, verbose=False)


def test_an_error_of_the_soak_itself_is_a_violation(idle_soak, monkeypatch, capsys):
    monkeypatch.setattr(Idle, "run", lambda *_: 1 // 0)
    assert soak.faults(idle_soak) == 1
    output = capsys.readouterr().out
    assert "VIOLATION, the end of a lane" in output and "ZeroDivisionError" in output
    assert "0 faults, 0 of them reached, " in output and "; 2 violations; " in output


def test_a_soak_whose_faults_are_not_reached_shows_nothing(idle_soak, capsys):
    assert soak.faults(idle_soak) == 1
    output = capsys.readouterr().out
    assert "3 faults, 0 of them reached, " in output and "; 0 violations; " in output
    assert "no fault was reached" in output


def test_kinds_leave_out_faults_of_others(idle_soak, capsys):
    idle_soak.kinds, idle_soak.faults = ["kill"], 40
    kills = [number for number in range(40) if draw(1, number, 4.0, ["gloo"]).kind == "kill"]
    soak.faults(idle_soak)
    assert f"{len(kills)} faults, 0 of them reached, " in capsys.readouterr().out and 0 < len(kills) < 40


def test_a_case_follows_from_its_seed_and_number():
    assert draw(1, 2, 4.0, ["gloo", "mpi"]) == draw(1, 2, 4.0, ["gloo", "mpi"])
    kinds = {draw(1, number, 4.0, ["gloo", "link", "mpi"]).kind for number in range(200)}
    assert kinds == {"kill", "stop", "delay", "outage", "cut", "packet", "mean", "exception", "memory", "disk"}


def test_sealed_messages_are_left_out_with_the_reason_where_cryptography_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cryptography" else find_spec(name))
    transports, reasons = soak_worlds.available_transports()
    assert "gloo" in transports and not any(soak_cases.is_sealed(name) for name in transports)
    assert "no messages are sealed: cryptography is missing (pip install 'qcomm[secure]')" in reasons


def test_a_sealed_sum_has_the_rules_of_a_sealed_message():
    flipped = replace(case_of("packet", "none"), transport="sealed", verify="interval")
    unnoticed = [report(("a", None), fired="GlooTransport.send of a sum, byte 3 of 9, bit 1")] * 2
    assert verdict(flipped, unnoticed, checks=unnoticed)[0] == "violation"
    assert verdict(replace(flipped, transport="mpi"), unnoticed, checks=unnoticed)[0] != "violation"
    # No step goes without a handshake, so that no later one may be the first to fail.
    assert replace(flipped, transport="mpi").late > flipped.late == 1


def case_of(kind, strategy="two_phase"):
    cases = (draw(1, number, 4.0, ["gloo"]) for number in range(10_000))
    return next(case for case in cases if (case.kind, case.strategy, case.world_size) == (kind, strategy, 2))


def report(*steps, fired=None):
    made = [StepReport(digest, error and "CollectiveError", error or "", False, 0.1) for digest, error in steps]
    return Report(made, fired, 0.0, 0, 0, 0)


def verdict(case: Case, reports, **seen):
    return judge(case, Observed(list(reports), **seen))


def test_the_rules_find_what_they_are_for():
    exception = case_of("exception")
    told = f"rank {exception.rank} failed while averaging its chunk: RuntimeError: boom"
    good = [report(("a", None), (None, told), ("b", None)) for _ in range(2)]
    assert verdict(exception, good) == ("error, rank named", [])
    # A rank without an error, one that differs, one that blames another, one that hangs, and one that has ended.
    assert verdict(exception, [good[0], report(("a", None), ("b", None))])[0] == "violation"
    differing = [report(("a", None), (None, told), (digest, None)) for digest in "bc"]
    assert "silent divergence" in verdict(exception, differing)[1][0]
    wrong = report((None, told.replace(f"rank {exception.rank}", f"rank {1 - exception.rank}")))
    assert verdict(exception, [wrong, wrong])[0] == "violation"
    assert verdict(exception, good, hung=[0])[1] == ["hang: rank(s) [0] did not come back"]
    assert "abort" in verdict(exception, good, exits={1: -6})[1][0]
    delay = case_of("delay")
    assert verdict(delay, [report(("a", None))] * 2) == ("no effect", [])
    assert verdict(delay, [report((None, "no answer from rank(s) 1 (died)"))] * 2)[0] == "violation"


def test_ranks_that_an_error_names():
    assert blamed("no answer from rank(s) 1, 3 (died), and rank 2 failed while") == {1, 2, 3}
    assert blamed("no answer from some rank of [0, 1, 2]") == set()
