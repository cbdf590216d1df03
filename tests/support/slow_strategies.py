"""Strategies that are made slow, so that the choice between them has one right answer."""

import time
from unittest import mock

from qcomm.collectives import strategies


def all_slow_but(winner, seconds):
    """Makes all strategies but one take longer on this rank."""

    def slow(mean):
        def slowly(rounds):
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline:  # busy, as a slow codec would be
                pass
            mean(rounds)

        return slowly

    means = strategies.MEAN_BY_STRATEGY
    return mock.patch.dict(means, {name: slow(mean) for name, mean in means.items() if name != winner})
