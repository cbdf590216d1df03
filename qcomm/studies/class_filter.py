"""A filter of samples by density: DBSCAN in each class by itself, whose noise is dropped.

The rule for ``eps``: in each class it is ``factor`` times the median distance of a point to its ``min_samples``-th
neighbour, where a point is its own first neighbour, as DBSCAN counts. So it follows the scale of the coordinates, which
differs between maps and with the number of points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qcomm.codec import CPU
from qcomm.recipes import NUM_CLASSES

LIBRARY_EPS, LIBRARY_MIN_SAMPLES = 0.5, 5  # scikit-learn's defaults


class Scores(NamedTuple):
    """Planted samples among those dropped.

    Attributes:
        kept: share of all samples that is kept.
        precision: share of the dropped samples that was planted; 0 if none is dropped.
        recall: share of the planted samples that is dropped; 0 if none is planted.
        chance_precision: precision of a random drop, the planted share.
        chance_recall: recall of a random drop of the same number, the dropped share.
    """

    kept: float
    precision: float
    recall: float
    chance_precision: float
    chance_recall: float


def plant(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Replaces a share of the labels by wrong ones, each drawn from the other classes with equal chances.

    Args:
        labels: int64 ``[n]``, of ``NUM_CLASSES`` classes.
        share: between 0 and 1.
        seed: of the choice.

    Returns:
        The new labels, and a bool tensor that is True where a label was replaced.

    Example:
        >>> labels, planted = plant(torch.arange(10), 0.3, 0)
        >>> int(planted.sum()), bool((labels[planted] != torch.arange(10)[planted]).all())
        (3, True)
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    order = torch.randperm(len(labels), generator=generator, dtype=torch.int64, device=CPU)
    chosen = order[: round(share * len(labels))]
    shifts = torch.randint(1, NUM_CLASSES, (len(chosen),), generator=generator, dtype=torch.int64, device=CPU)
    noisy, planted = labels.clone(), torch.zeros(len(labels), dtype=torch.bool, device=CPU)
    noisy[chosen] = (labels[chosen] + shifts) % NUM_CLASSES
    planted[chosen] = True
    return noisy, planted


def median_distance(places: Tensor, min_samples: int) -> float:
    """Returns the median distance to the ``min_samples``-th neighbour, a point being its own first one.

    Args:
        places: ``[n, 2]`` with at least ``min_samples`` rows.
        min_samples: as in DBSCAN.

    Example:
        >>> median_distance(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), 2)
        1.0
    """
    from sklearn.neighbors import NearestNeighbors

    points = places.double().numpy()
    distances, _ = NearestNeighbors(n_neighbors=min_samples).fit(points).kneighbors(points)
    return float(torch.as_tensor(distances[:, -1], dtype=torch.float64, device=CPU).quantile(0.5))


def keep(places: Tensor, labels: Tensor, min_samples: int, *, factor: float = 0.0, eps: float | None = None) -> Tensor:
    """Runs DBSCAN in each class, and returns True for every sample that is not its noise.

    Args:
        places: ``[n, 2]``.
        labels: int64 ``[n]``.
        min_samples: of DBSCAN. A class with fewer points is kept whole, since it says nothing about density.
        factor: of the rule above, if ``eps`` is None.
        eps: the same for all classes.

    Source:
        M. Ester, H.-P. Kriegel, J. Sander and X. Xu, "A density-based algorithm for discovering clusters", KDD 1996.
    """
    from sklearn.cluster import DBSCAN

    kept = torch.ones(len(labels), dtype=torch.bool, device=CPU)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < min_samples:
            continue
        own = places[members]
        radius = factor * median_distance(own, min_samples) if eps is None else eps
        if radius == 0:  # more than half of the points coincide, and DBSCAN takes no eps of 0
            continue
        found = DBSCAN(eps=radius, min_samples=min_samples).fit_predict(own.double().numpy())
        kept[members] = torch.as_tensor(found, dtype=torch.int64, device=CPU) != -1
    return kept


def drop_at_random(count: int, dropped: int, seed: int) -> Tensor:
    """Returns True for all but ``dropped`` of ``count`` samples.

    Example:
        >>> int(drop_at_random(10, 3, 0).sum())
        7
    """
    generator = torch.Generator().manual_seed(3000 + seed)
    kept = torch.ones(count, dtype=torch.bool, device=CPU)
    kept[torch.randperm(count, generator=generator, dtype=torch.int64, device=CPU)[:dropped]] = False
    return kept


def scores(kept: Tensor, planted: Tensor) -> Scores:
    """Compares the dropped samples with those that were planted.

    Example:
        >>> scores(torch.tensor([True, True, False, False]), torch.tensor([False, False, False, True]))
        Scores(kept=0.5, precision=0.5, recall=1.0, chance_precision=0.25, chance_recall=0.5)
    """
    count, dropped, wrong = len(kept), int((~kept).sum()), int(planted.sum())
    found = int((~kept & planted).sum())
    precision, recall = found / max(dropped, 1), found / max(wrong, 1)
    return Scores(1 - dropped / count, precision, recall, wrong / count, dropped / count)
