"""Compressed gradients in training frameworks: Lightning and Fabric, Accelerate, the Trainer of transformers, torchft.

One module per framework, which imports it. Nothing else here does, so a program imports the module that it needs::

    from qcomm.integrations.lightning import QcommCallback

That of torchft has a process group for its Manager. Each of the others finds the DDP model where its framework keeps
it, calls :func:`qcomm.attach`, passes on the framework's gradient scaler, and puts the residuals of every rank into the
framework's own checkpoints. docs/frameworks.md has examples.
"""

from qcomm.integrations.gathered_state import GatheredState

__all__ = ["GatheredState"]
