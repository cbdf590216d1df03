"""The mean of one tensor over all ranks, with compressed traffic: ``all_reduce`` and its handle."""

from qcomm.allreduce.call import all_reduce
from qcomm.allreduce.work import AllReduceWork

__all__ = ["AllReduceWork", "all_reduce"]
