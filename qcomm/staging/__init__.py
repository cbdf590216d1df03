"""Staging: tensors of any device on their way through host memory, where the codec of the CPU and the network are.

The room knows devices by what torch offers for all of them (``torch.accelerator``, ``torch.Stream``, ``torch.Event``),
and no kind by its name.
"""

from qcomm.staging.copies import Staged, stage
from qcomm.staging.devices import check_device, device_types

__all__ = ["Staged", "check_device", "device_types", "stage"]
