"""Compressed state dicts: saved to files, and packed for a broadcast."""

from qcomm.state_dicts.files import load, save
from qcomm.state_dicts.format import pack_state, packed_size_limit, unpack_state

__all__ = ["load", "pack_state", "packed_size_limit", "save", "unpack_state"]
