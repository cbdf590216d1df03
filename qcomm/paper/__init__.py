"""The experiments of the paper that RangeGrid comes from, repeated: compressed exchange of weights, once an epoch.

A. Oland and B. Raj, "Reducing communication overhead in distributed learning by an order of magnitude (almost)", ICASSP
2015. ``qcomm paper`` is the command-line face of this package; docs/paper.md says what came out.
"""
