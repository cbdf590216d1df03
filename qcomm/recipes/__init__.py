"""Training recipes: ResNets, small image data sets and a data-parallel training loop to measure gradient exchange with.

``qcomm train`` is the command-line face of this package; ``qcomm.recipes.train.train`` is the loop itself.
"""

from qcomm.recipes.compare import comparison_configs, run_all
from qcomm.recipes.config import AMP_MODES, GRIDS, METHODS, TrainConfig
from qcomm.recipes.datasets import DATASET_NAMES, NUM_CLASSES, Dataset, Split, augmentation_generator, load_dataset
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.launch import USER_ERROR, launch, launched_world_size
from qcomm.recipes.models import MODEL_NAMES
from qcomm.recipes.train import check

__all__ = [
    "AMP_MODES",
    "DATASET_NAMES",
    "GRIDS",
    "METHODS",
    "MODEL_NAMES",
    "NUM_CLASSES",
    "USER_ERROR",
    "Dataset",
    "RecipeError",
    "Split",
    "TrainConfig",
    "augmentation_generator",
    "check",
    "comparison_configs",
    "launch",
    "launched_world_size",
    "load_dataset",
    "run_all",
]
