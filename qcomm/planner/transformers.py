"""Transformers by formula: BERT and GPT-2, their embeddings tied to the output layer.

A tied embedding's gradient is complete only when backward has reached the input, so this large gradient comes last.
The operations of the output layer are counted at its bias in BERT and at the last normalisation in GPT-2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qcomm.planner.profiles import ModelProfile, ParameterTensor

__all__ = ["BERTS", "GPT2S", "bert", "gpt2"]


@dataclass(frozen=True)
class Size:
    """The size of a transformer, whose feed-forward layers are four times as wide inside."""

    layers: int
    width: int
    vocabulary: int
    positions: int
    default_sequence: int


# arXiv:1810.04805, pre-training at the sequence length of its first phase.
BERTS: Mapping[str, Size] = {
    "bert-base": Size(12, 768, 30522, 512, 128),
    "bert-large": Size(24, 1024, 30522, 512, 128),
}
# Radford et al., "Language models are unsupervised multitask learners", 2019
GPT2S: Mapping[str, Size] = {
    "gpt2": Size(12, 768, 50257, 1024, 1024),
    "gpt2-medium": Size(24, 1024, 50257, 1024, 1024),
    "gpt2-large": Size(36, 1280, 50257, 1024, 1024),
    "gpt2-xl": Size(48, 1600, 50257, 1024, 1024),
}
MASKED = 0.15  # share of BERT's tokens whose words are predicted
BYTES_A_TOKEN = 2


def _linear(name: str, c_in: int, c_out: int, tokens: float, more: float = 0.0) -> list[ParameterTensor]:
    weight = ParameterTensor(f"{name}.weight", (c_out, c_in), 2.0 * c_in * c_out * tokens + more)
    return [weight, ParameterTensor(f"{name}.bias", (c_out,))]


def _norm(name: str, width: int, flops: float = 0.0) -> list[ParameterTensor]:
    return [ParameterTensor(f"{name}.weight", (width,), flops), ParameterTensor(f"{name}.bias", (width,))]


def _profile(name: str, forward: list[ParameterTensor], tokens: int) -> ModelProfile:
    return ModelProfile(name, "transformer", tuple(reversed(forward)), "sequences", tokens, BYTES_A_TOKEN * tokens)


def _scores(width: int, tokens: int) -> float:
    """Returns the operations of queries times keys and of weights times values."""
    return 4.0 * tokens * tokens * width


def bert(name: str, tokens: int) -> ModelProfile:
    """Returns the profile of BERT with its two heads for pre-training, on sequences of ``tokens``.

    Example:
        >>> bert("bert-large", 128).parameters
        336226108
    """
    size = BERTS[name]
    width = size.width
    tensors = [
        ParameterTensor("embeddings.word", (size.vocabulary, width)),
        ParameterTensor("embeddings.position", (size.positions, width)),
        ParameterTensor("embeddings.type", (2, width)),
        *_norm("embeddings.norm", width),
    ]
    for layer in range(size.layers):
        at = f"layer{layer}"
        for part in ("query", "key", "value"):
            tensors += _linear(f"{at}.{part}", width, width, tokens)
        tensors += _linear(f"{at}.attention", width, width, tokens, more=_scores(width, tokens))
        tensors += _norm(f"{at}.attention.norm", width)
        tensors += _linear(f"{at}.up", width, 4 * width, tokens)
        tensors += _linear(f"{at}.down", 4 * width, width, tokens)
        tensors += _norm(f"{at}.norm", width)
    masked = MASKED * tokens
    tensors += _linear("pooler", width, width, 1)
    tensors += _linear("words.transform", width, width, masked)
    tensors += _norm("words.norm", width)
    tensors.append(ParameterTensor("words.bias", (size.vocabulary,), 2.0 * width * size.vocabulary * masked))
    tensors += _linear("next_sentence", width, 2, 1)
    return _profile(name, tensors, tokens)


def gpt2(name: str, tokens: int) -> ModelProfile:
    """Returns the profile of GPT-2 on sequences of ``tokens``.

    Example:
        >>> gpt2("gpt2", 1024).parameters, gpt2("gpt2-xl", 1024).parameters
        (124439808, 1557611200)
    """
    size = GPT2S[name]
    width = size.width
    tensors = [
        ParameterTensor("embeddings.word", (size.vocabulary, width)),
        ParameterTensor("embeddings.position", (size.positions, width)),
    ]
    for layer in range(size.layers):
        at = f"layer{layer}"
        tensors += _norm(f"{at}.attention.norm", width)
        tensors += _linear(f"{at}.query_key_value", width, 3 * width, tokens)
        tensors += _linear(f"{at}.attention", width, width, tokens, more=_scores(width, tokens))
        tensors += _norm(f"{at}.norm", width)
        tensors += _linear(f"{at}.up", width, 4 * width, tokens)
        tensors += _linear(f"{at}.down", 4 * width, width, tokens)
    tensors += _norm("norm", width, flops=2.0 * width * size.vocabulary * tokens)
    return _profile(name, tensors, tokens)
