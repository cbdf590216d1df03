"""Modules of integrations import their framework only, name what to install, and say why there is no DDP model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcomm
from qcomm.integrations.ddp_models import find_ddp

MODULES = ("accelerate", "lightning", "torchft", "transformers")
FRAMEWORKS = (*MODULES, "pytorch_lightning")


def python(program):
    """The output of a program in a process of its own."""
    paths = [str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_framework_is_imported_unless_asked_for():
    program = f"import sys, qcomm, qcomm.integrations; print([n for n in {FRAMEWORKS} if n in sys.modules])"
    assert python(program) == "[]"


def test_a_missing_framework_is_an_error_with_the_command_that_installs_it():
    program = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({FRAMEWORKS}))
for name in {MODULES}:
    try:
        importlib.import_module("qcomm.integrations." + name)
    except ImportError as error:
        print(error)
"""
    for line, name in zip(python(program).splitlines(), MODULES, strict=True):
        assert line.startswith(f"qcomm.integrations.{name} needs {name}: pip install 'qcomm[{name}]' ("), line


@pytest.mark.parametrize(
    ("kind", "consequence"),
    [
        ("FSDPStrategy", "it shards the weights and reduces gradients itself, uncompressed"),
        ("FSDP", "it shards the weights and reduces gradients itself, uncompressed"),
        ("ModelParallelStrategy", "it shards the weights and reduces gradients itself, uncompressed"),
        ("DeepSpeedStrategy", "its engine reduces gradients itself, uncompressed"),
        ("DEEPSPEED", "its engine reduces gradients itself, uncompressed"),
        ("MEGATRON_LM", "its engine reduces gradients itself, uncompressed"),
        ("SingleDeviceStrategy", "a single process sends no gradients"),
        ("NO", "a single process sends no gradients"),
        ("DataParallelStrategy", "one process feeds several devices"),
        ("NovelStrategy", "gradients would travel uncompressed"),
        ("MULTI_GPU", "gradients would travel uncompressed"),
    ],
)
def test_a_strategy_without_ddp_is_refused_with_what_it_does(kind, consequence):
    with pytest.raises(TypeError) as caught:
        find_ddp(torch.nn.Linear(2, 2), kind, "do this")
    assert f"and {kind} has wrapped Linear in none: {consequence}" in str(caught.value)
    assert str(caught.value).endswith(". For DDP: do this")


def test_no_model_at_all_is_refused():
    with pytest.raises(TypeError, match="has wrapped NoneType in none"):
        find_ddp(None, "XLAStrategy", "do this")
