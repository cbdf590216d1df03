"""The debt of error feedback: the sum of all means is that of the exact ones, less this."""

import torch


def owed(states, name, numel):
    """mean(e) + o of a parameter, float64; ``states``: of the ranks' error feedback, in the order of the ranks."""
    total = torch.zeros(numel, dtype=torch.float64)
    for state in states:
        if name in state["local"]:
            total += state["local"][name].double() / len(states)
        if name in state["owner"]:
            start, residual = state["owner"][name]
            total[start : start + residual.numel()] += residual.double()
    return total
