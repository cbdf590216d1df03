"""Studies of what the project's other sources claim about gradients, at a scale that a laptop has.

``qcomm study`` is the command-line interface of this package; docs/studies.md has the results.
"""

from typing import Any

from qcomm.studies import batch_size, bit_rule, data_filter, noise_scale, partitions
from qcomm.studies.data_filter import FilterSettings
from qcomm.studies.scatter_page import write_page
from qcomm.studies.settings import DATASETS, StudySettings
from qcomm.studies.study import Study, perform

# By their names in `qcomm study`.
STUDIES: dict[str, Study[Any]] = {
    module.STUDY.name: module.STUDY for module in (noise_scale, batch_size, bit_rule, partitions, data_filter)
}

__all__ = ["DATASETS", "STUDIES", "FilterSettings", "Study", "StudySettings", "perform", "write_page"]
