"""The ranks that an error names: those that are gone, and not the survivors that closed their connections first."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from all_reduce_checks import attempt, check_works
from distributed import TIMEOUT, die, world

from qcomm.transport import lost_ranks
from qcomm.transport.lost_ranks import LostRanks


def ranks(count, store=None):
    store = store or dist.HashStore()
    return [LostRanks(store, rank, count) for rank in range(count)]


def test_a_chain_of_survivors_leads_to_the_rank_that_is_gone():
    of = ranks(5)
    assert of[0].note({4}) == {4}
    assert of[1].note({0}) == {4}
    assert of[2].note({1}) == {4}
    assert of[3].note({2, 1}) == {4}


def test_several_ranks_that_are_gone_are_all_named():
    of = ranks(5)
    assert of[0].note({3, 4}) == {3, 4}
    assert of[1].note({0}) == {3, 4}
    assert of[2].note({1, 4}) == {3, 4}


def test_a_rank_that_failed_by_itself_says_so():
    of = ranks(4)
    assert of[1].note({1}) == {1}
    assert of[0].note(()) == {1}
    assert of[2].note({0}) == {1}
    assert of[3].note({2}) == {1}


def test_a_reason_is_cut_by_whoever_reads_it():
    store = dist.HashStore()
    first, second = ranks(2, store)
    second.give_reason("x" * 10_000)
    assert first.reasons([1]) == {1: "x" * lost_ranks.REASON_CHARACTERS}
    store.set(LostRanks._reason_key(1), b"\xff" * 10_000)
    assert len(first.reasons([0, 1])[1]) == lost_ranks.REASON_CHARACTERS


def test_a_rank_is_not_told_of_itself():
    of = ranks(3)
    of[0].note({1})  # rank 1 was late, and lives
    assert of[1].note({0}) == {0}


@pytest.mark.parametrize("count", [3, 4, 5])
def test_ranks_that_lost_each_other_do_not_end_in_a_circle(count):
    of = ranks(count)
    assert of[0].note({1}) == {1} and of[1].note({0}) == {0}
    assert of[2].note({0}) == {1}


def test_where_no_rank_is_known_those_that_others_lost_are_named():
    of = ranks(4)
    assert of[0].note(()) == set()
    assert of[1].note({3}) == {3}
    assert of[2].note(()) == {3}


def test_a_thread_that_waits_at_the_store_keeps_nobody_from_asking():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    if not hasattr(store, "clone"):
        pytest.skip("this torch has one connection to the store for a process")
    of, waits, key = ranks(3, store), threading.Event(), "never before the answer"
    waiting = threading.Thread(target=lambda: (waits.set(), store.get(key)))
    waiting.start()
    assert waits.wait(60) and of[0].note({1}) == {1} and of[2].note({0}) == {1}
    store.clone().set(key, "")
    waiting.join()


def test_without_the_store_the_ranks_themselves_are_named(monkeypatch):
    monkeypatch.setattr(lost_ranks, "ANSWER_SECONDS", 0.2)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    of = ranks(3, client)
    assert of[0].note({1}) == {1}
    del server
    begin = time.monotonic()
    assert of[2].note({0}) == {0}
    assert time.monotonic() - begin < 4


@pytest.mark.world
@world(4, alone=True, dying=(2,), seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum", "hierarchical", "none"])
def test_a_killed_rank_is_named_and_no_other(rank, world_size, strategy):
    options = {"strategy": strategy} | ({"ranks_per_node": 2} if strategy == "hierarchical" else {})
    check_works(rank, world_size)
    error = attempt(**options)
    assert error is None
    if rank == 2:
        die()
    error = attempt(**options)
    assert "no answer from rank(s) 2 (" in str(error), error
