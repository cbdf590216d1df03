"""The built-in models of the planner, by name."""

import difflib

from qcomm.planner.errors import PlanError
from qcomm.planner.networks import RESNETS, resnet, vgg16
from qcomm.planner.profiles import ModelProfile
from qcomm.planner.transformers import BERTS, GPT2S, bert, gpt2

__all__ = ["MODEL_NAMES", "built_in"]

MODEL_NAMES = (*RESNETS, "vgg16", *BERTS, *GPT2S)


def built_in(name: str, sequence: int | None = None) -> ModelProfile:
    """Returns the profile of a well-known model.

    Args:
        name: one of ``MODEL_NAMES``.
        sequence: tokens of a sample, for transformers only; by default 128 for BERT and 1024 for GPT-2.

    Raises:
        PlanError: the model is unknown, or cannot have such a sequence.

    Example:
        >>> built_in("resnet18").parameters
        11689512
        >>> built_in("bert-large", sequence=512).sample_values
        512
    """
    if name not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise PlanError(f"model is {name!r}{hint}; it must be one of {', '.join(MODEL_NAMES)}")
    size = {**BERTS, **GPT2S}.get(name)
    if size is None:
        if sequence is not None:
            raise PlanError(f"sequence is {sequence}, but {name} takes images; leave it out")
        return vgg16() if name == "vgg16" else resnet(name)
    tokens = size.default_sequence if sequence is None else sequence
    if not 1 <= tokens <= size.positions:
        raise PlanError(f"sequence is {tokens}; {name} takes 1 to {size.positions} tokens")
    return bert(name, tokens) if name in BERTS else gpt2(name, tokens)
