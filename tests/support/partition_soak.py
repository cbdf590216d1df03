"""Random stalls in every partition of a pipeline: its queues never deadlock, and its weights stay right.

    python tests/support/partition_soak.py --minutes 5          # prints its seed

A seed decides the number of partitions, the length of the queue, the batches, and how long each partition stalls before
each batch. A stall is load, and nothing is waited for.
"""

import argparse
import random
import threading
import time
from unittest import mock

from distributed import World
from partition_models import batches, optimizer, same, stage, trained
from torch.nn import functional

from qcomm import PartitionPipeline, RangeGrid

LONGEST_STALL = 0.02  # seconds
GRID = RangeGrid(num_bits=6)


def stalled_training(rank, world_size, seed, partitions):
    """Trains under stalls and checks the weights; ``partitions`` may be fewer than ranks by a factor: DDP inside."""
    drawn, stalls = random.Random(seed), random.Random(f"{seed} {rank}")
    length, counts = drawn.randint(1, 4), [drawn.randint(0, 12) for _ in range(3)]
    epochs = [batches(count, seed=seed + number) for number, count in enumerate(counts)]
    whole = functional.cross_entropy

    def stalling(*arguments, **options):
        threading.Event().wait(stalls.choice([0.0, 0.0, stalls.uniform(0, LONGEST_STALL)]))
        return whole(*arguments, **options)

    own = stage(rank * partitions // world_size)
    line = PartitionPipeline(own, optimizer(own), partitions, grid=GRID, queue_batches=length)
    with mock.patch("torch.nn.functional.cross_entropy", stalling):
        for data in epochs:
            line.run_epoch(data if line.is_first else None)
    line.close()
    if partitions == world_size:  # DDP rounds its mean in another order
        assert same(own.state_dict(), trained(partitions, epochs, GRID)[rank]), f"seed {seed}"
    return sum(counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    worlds = {size: World(size) for size in (2, 3, 4)}
    end, runs, trained_batches = time.monotonic() + 60 * options.minutes, 0, 0
    try:
        while time.monotonic() < end:
            size, partitions = random.Random(options.seed + runs).choice([(2, 2), (3, 3), (4, 4), (4, 2)])
            trained_batches += worlds[size].run(stalled_training, options.seed + runs, partitions)[0]
            runs += 1
    finally:
        for world in worlds.values():
            world.close(kill=True)
    print(f"{runs} runs, {trained_batches} batches, no deadlock, right weights")


if __name__ == "__main__":
    main()
