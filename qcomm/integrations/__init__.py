"""The hook inside training frameworks: Lightning and Fabric, Accelerate, and the Trainer of transformers.

One module per framework, which imports it. Nothing else here does, so a program imports the module that it needs::

    from qcomm.integrations.lightning import QcommCallback

Each finds the DDP model where its framework keeps it, calls :func:`qcomm.attach`, passes on the framework's gradient
scaler, and puts the residuals of every rank into the framework's own checkpoints. docs/frameworks.md has examples.
"""

from qcomm.integrations.gathered_state import GatheredState

__all__ = ["GatheredState"]
