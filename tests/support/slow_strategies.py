"""Strategies that are made slow, so that the choice between them has one right answer."""

import time
from unittest import mock

from qcomm.collectives import strategies


def all_slow_but(winner, seconds):
    """Makes all ways to the mean but one take longer on this rank."""

    def slow(way):
        def slowly(rounds):
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline:  # busy, as a slow codec would be
                pass
            way(rounds)

        return slowly

    return mock.patch.dict(strategies.WAYS, {n: slow(way) for n, way in strategies.WAYS.items() if n != winner})
