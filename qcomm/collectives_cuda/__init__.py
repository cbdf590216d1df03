"""Collectives with the codec on the device: every step is launched, and the host waits only at agreements."""

from qcomm.collectives_cuda.handshake import DevicePart
from qcomm.collectives_cuda.strategies import DeviceChoice, check_device_options
from qcomm.collectives_cuda.two_phase import check_group

__all__ = ["DeviceChoice", "DevicePart", "check_device_options", "check_group"]
