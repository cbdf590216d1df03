"""Model profiles: sizes are those of the real networks, and a measured profile says what backward does."""

import pytest
import torch
from torch import nn

from qcomm.planner import MODEL_NAMES, PlanError, built_in, profile
from qcomm.planner.compute import LAUNCH_SECONDS, compute_times
from qcomm.planner.hardware import GPUS
from qcomm.planner.schedulers import Ddp
from qcomm.recipes.models import build_model

# Of torchvision's networks, of transformers' BertForPreTraining and of GPT-2's releases.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg16": 138_357_544,
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


def test_parameters_are_those_of_the_networks():
    assert {name: built_in(name).parameters for name in MODEL_NAMES} == PARAMETERS


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_residual_networks_have_the_recipes_tensors_in_backward_order(name):
    with torch.device("meta"):
        model = build_model(name, image_size=224, num_classes=1000)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    formula = [tensor.shape for tensor in built_in(name).tensors]
    assert sorted(shapes) == sorted(formula)
    # The classifier's gradient comes first and the stem's last.
    assert formula[:2] == [(1000,), shapes[-2]]
    assert formula[-1] == shapes[0]


# Billions of multiply-adds of an image: torchvision's table; of VGG16: 15.5.
PUBLISHED = {
    "resnet18": 1.81,
    "resnet34": 3.66,
    "resnet50": 4.09,
    "resnet101": 7.80,
    "resnet152": 11.51,
    "vgg16": 15.47,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_are_the_published_ones(name):
    assert built_in(name).forward_flops == pytest.approx(2e9 * PUBLISHED[name], rel=0.01)


def test_flops_of_a_transformer():
    # Six a parameter and token in a step, and the attention scores.
    gpt2 = built_in("gpt2")
    matrices = sum(tensor.elements for tensor in gpt2.tensors if len(tensor.shape) == 2) - 1024 * 768
    assert gpt2.forward_flops == pytest.approx(2 * 1024 * matrices + 12 * 4 * 1024**2 * 768)


def test_a_longer_sequence_is_more_work_for_the_same_parameters():
    short, long = built_in("bert-base"), built_in("bert-base", sequence=512)
    assert short.parameters == long.parameters
    assert 4 * short.forward_flops < long.forward_flops < 5 * short.forward_flops


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("resnet5",), "did you mean 'resnet50'.*resnet18, resnet34"),
        (("alexnet",), "it must be one of resnet18"),
        (("resnet50", 128), "takes images; leave it out"),
        (("bert-base", 513), "sequence is 513; bert-base takes 1 to 512 tokens"),
        (("gpt2", 0), "sequence is 0; gpt2 takes 1 to 1024 tokens"),
    ],
)
def test_unknown_models_are_refused(arguments, match):
    with pytest.raises(PlanError, match=match):
        built_in(*arguments)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.early = nn.Linear(32, 32)
        self.late = nn.Linear(32, 8, bias=False)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x, y):
        return {"logits": self.late(self.frozen(self.early(x)) + y)}


def test_a_measured_profile_is_in_backward_order():
    model = Branches()
    model.early.weight.grad = torch.ones(32, 32)
    found = profile(model, (torch.randn(16, 32), torch.randn(16, 32)), repeats=2)
    names = [tensor.name for tensor in found.tensors]
    assert names[0] == "late.weight"
    assert sorted(names[1:]) == ["early.bias", "early.weight"]
    assert found.parameters == 32 * 32 + 32 + 8 * 32
    assert (found.measured_batch, found.sample_values, found.sample_bytes) == (16, 64, 256)
    assert found.measured_forward_seconds > 0
    assert all(tensor.backward_seconds >= 0 for tensor in found.tensors)
    assert found.tensors[0].backward_seconds > 0
    assert model.early.weight.grad.equal(torch.ones(32, 32))  # as it was
    assert model.late.weight.grad is None
    assert not model.late.weight._post_accumulate_grad_hooks


def test_a_measured_profile_takes_keywords_and_a_loss():
    model = nn.Bilinear(4, 4, 2)
    example = {"input1": torch.randn(3, 4), "input2": torch.randn(3, 4)}
    found = profile(model, example, loss=lambda output: output.square().sum(), repeats=1, name="bilinear")
    assert (found.name, found.parameters, found.measured_batch) == ("bilinear", 34, 3)


def test_measured_times_scale_with_the_batch():
    found = profile(nn.Linear(64, 64), torch.randn(8, 64), repeats=1)
    once, twice = compute_times(found, 8, None), compute_times(found, 16, None)
    assert twice.step == pytest.approx(2 * once.step)
    assert compute_times(found, 8, None, samples_per_second=100.0).step == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("model", "example", "options", "match"),
    [
        (nn.Linear(2, 2), torch.zeros(2, 2), {"repeats": 0}, "repeats is 0"),
        (nn.Linear(2, 2), (), {}, "example must hold a tensor"),
        (nn.Linear(2, 2), torch.zeros(0, 2), {}, "at least one sample"),
        (nn.ReLU(), torch.zeros(2, 2), {}, "no floating-point tensor to differentiate"),
        (nn.ReLU(), torch.zeros(2, 2, requires_grad=True), {}, "no parameter that needs a gradient"),
    ],
)
def test_what_cannot_be_profiled(model, example, options, match):
    with pytest.raises(PlanError, match=match):
        profile(model, example, **options)


def test_computing_takes_what_the_preset_says_but_not_less_than_its_launches():
    model = built_in("resnet50")
    times = compute_times(model, 128, GPUS["v100"])
    assert 128 / times.step == pytest.approx(367, rel=0.01)  # NVIDIA's figure, from which the preset is
    assert times.backward == pytest.approx(2 * times.forward)
    assert list(times.ready) == sorted(times.ready)
    tiny = compute_times(model, 1, GPUS["h200"], "amp")
    assert tiny.forward >= LAUNCH_SECONDS * len(model.tensors)
    assert compute_times(model, 64, None, samples_per_second=640.0).step == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"gpu": None}, "gpu must be given for resnet18"),
        ({"precision": "fp8"}, "precision is 'fp8'; it must be one of fp32, amp"),
        ({"gpu": GPUS["p100"], "precision": "amp"}, "p100 has no tensor cores; use fp32"),
        ({"samples_per_second": 0.0}, "samples_per_second is 0.0; it must be positive"),
    ],
)
def test_what_cannot_be_computed(options, match):
    arguments = {"batch": 32, "gpu": GPUS["v100"], **options}
    with pytest.raises(PlanError, match=match):
        compute_times(built_in("resnet18"), **arguments)


def test_ddp_fills_a_small_bucket_first():
    model = built_in("resnet50")
    times = compute_times(model, 32, GPUS["v100"])
    buckets = Ddp().buckets(model, times, 8)
    sizes = [4 * sum(tensor.elements for tensor in bucket.tensors) for bucket in buckets]
    assert sum(len(bucket.tensors) for bucket in buckets) == len(model.tensors)
    # As torch makes them: 1 MiB is passed with the classifier, then 25 MiB at least, what is left in the end.
    assert sizes[0] == 4 * (1000 + 1000 * 2048)
    assert all(25 * 2**20 <= size < 35 * 2**20 for size in sizes[1:-1])
    assert [bucket.ready for bucket in buckets] == sorted(bucket.ready for bucket in buckets)
    assert buckets[-1].ready == times.backward
    late = Ddp(overlap=False).buckets(model, times, 8)
    assert {bucket.ready for bucket in late} == {times.backward}
    with pytest.raises(PlanError, match="bucket_mib is 0"):
        Ddp(bucket_mib=0)
