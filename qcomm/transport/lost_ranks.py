"""Lost ranks: a rank that gives its connections up says on the store which ranks it had lost.

A dead process cannot be announced. The first survivor that notices closes its own connections, so that nobody waits
until the timeout. To a third rank it then looks as dead as the other. So each rank writes the names of those it lost to
the group's store before it closes. A rank that loses another looks there first, and blames those that it names.

The store may be gone, too: one rank's process has it. It is therefore asked on a thread of its own, whose answer is
awaited for a short time, and only once in vain. The thread has a connection of its own as well: on that of the process
it would wait for whoever waits there for a key.
"""

import json
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["LostRanks", "last_in_chains"]

T = TypeVar("T")

ANSWER_SECONDS = 4.0
REASON_CHARACTERS = 500


class LostRanks:
    """The ranks that the ranks of a group have lost.

    Args:
        store: of these connections alone.
        rank, world_size: this process within the group, and the number of ranks in it.

    Example:
        >>> store = dist.HashStore()
        >>> first, second = LostRanks(store, 0, 3), LostRanks(store, 1, 3)
        >>> first.note({2}), second.note({0})
        ({2}, {2})
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._is_silent = False  # the store

    def note(self, lost: Collection[int]) -> set[int]:
        """Tells the others of ranks that this one has lost; returns those to blame.

        These are the given ranks, with each one that had itself lost others replaced by those. Without a given rank
        they are all that any rank has lost.
        """
        return self._ask(lambda store: self._note(store, set(lost))) or set(lost)

    def give_reason(self, reason: str) -> None:
        """Writes why this rank failed, at most REASON_CHARACTERS of it."""
        self._ask(lambda store: store.set(self._reason_key(self._rank), reason[:REASON_CHARACTERS]))

    def reasons(self, ranks: Collection[int]) -> dict[int, str]:
        """Returns why ranks failed, of those that have said so.

        Example:
            >>> store = dist.HashStore()
            >>> first, second = LostRanks(store, 0, 2), LostRanks(store, 1, 2)
            >>> second.give_reason("no memory")
            >>> first.reasons([0, 1])
            {1: 'no memory'}
        """
        return self._ask(lambda store: self._reasons(store, ranks)) or {}

    def _reasons(self, store: dist.Store, ranks: Collection[int]) -> dict[int, str]:
        told = [rank for rank in ranks if store.check([self._reason_key(rank)])]
        texts = {rank: store.get(self._reason_key(rank)).decode(errors="replace") for rank in told}
        return {rank: text[:REASON_CHARACTERS] for rank, text in texts.items()}  # whoever wrote it

    @staticmethod
    def _reason_key(rank: int) -> str:
        return f"reason of {rank}"

    def _ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """Returns the store's answer; None where it does not give one."""
        if self._is_silent:
            return None
        found: list[T] = []
        store: Any = self._store  # torch's stubs do not know clone, nor do older versions of torch have it

        def run() -> None:
            try:
                found.append(question(store.clone() if hasattr(store, "clone") else store))
            except (RuntimeError, ValueError):  # torch's errors of a store that is gone, and what is no JSON
                return

        thread = threading.Thread(target=run, name="qcomm lost ranks", daemon=True)
        thread.start()
        thread.join(ANSWER_SECONDS)
        self._is_silent = thread.is_alive()
        return found[0] if found else None

    def _note(self, store: dist.Store, lost: set[int]) -> set[int]:
        ranks = [rank for rank in range(self._world_size) if rank != self._rank]
        told = {rank: json.loads(store.get(self._key(rank))) for rank in ranks if store.check([self._key(rank)])}
        begin = lost or {other for others in told.values() for other in others if other != self._rank}
        blamed = last_in_chains(begin, told, self._rank)
        store.set(self._key(self._rank), json.dumps(sorted(blamed)))
        return blamed

    @staticmethod
    def _key(rank: int) -> str:
        return f"lost by {rank}"


def last_in_chains(lost: Collection[int], told: Mapping[int, Collection[int]], own: int) -> set[int]:
    """Returns the ranks to blame for ``lost``: each one that had itself lost others is replaced by those.

    Args:
        lost: by this rank.
        told: the ranks that others said they had lost, by rank. A rank that names itself has failed.
        own: this rank, which does not blame itself.

    Example:
        >>> last_in_chains({0}, {0: [1], 1: [2]}, own=3)
        {2}
    """
    return {last for rank in lost for last in _ends(rank, told, {own})}


def _ends(rank: int, told: Mapping[int, Collection[int]], passed: Collection[int]) -> set[int]:
    """Returns the ranks at the ends of the chains that begin with ``rank``: they told nothing, or nothing new."""
    passed = {*passed, rank}
    beyond = {last for other in told.get(rank, ()) if other not in passed for last in _ends(other, told, passed)}
    return beyond or {rank}
