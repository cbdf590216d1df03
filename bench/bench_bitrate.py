"""Bits that each layer's gradient takes, step by step, over a real training run.

    python bench/bench_bitrate.py                              # ResNet-20, digits, two ranks of this machine
    python bench/bench_bitrate.py --methods "qcomm k=1" "qcomm range c=6" --steps 450 --json bitrate.json
    python bench/bench_bitrate.py --model resnet18 --dataset fashion-mnist --methods "qcomm k=3.2" "qcomm k=3.4"

Every `--every` steps rank 0 codes each layer's gradient once more, alone, together with what error feedback adds to
it: the size of that packet, all headers counted, is what the layer costs, whatever chunk it then travels in. Layers
below 1,024 elements travel together and are left out. Phases are the hook's own count of what crossed the network in
that step, those layers and all headers of packets included: in phase 1 gradients, in phase 2 their means. At steps
beyond 2 residuals grow over the first hundred steps; the second half of the run is shown by itself.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gradient_data import MIN_ELEMENTS
from ranks import RanksError, about, is_rank, run_ranks, start_rank, write
from training import Task, Trainer

from qcomm.codec import Segment, encode, measure, plan
from qcomm.recipes.datasets import DATASET_NAMES
from qcomm.recipes.models import MODEL_NAMES

METHODS = ("qcomm k=0.5", "qcomm k=1", "qcomm k=2", "qcomm k=3.2", "qcomm k=3.4", "qcomm range c=6")
BATCH = 32


class LayerMeter:
    """Sizes each layer's local gradient while backward makes it.

    Attributes:
        bits: bits an element, by layer, of the last measured step.
        elements: of each layer.
    """

    def __init__(self, trainer: Trainer) -> None:
        if trainer.state is None or trainer.state.error_feedback is None:
            raise ValueError(f"method must be one of qcomm's with error feedback, got {trainer.method!r}")
        self._state, self._feedback = trainer.state, trainer.state.error_feedback
        self._residuals: dict[str, torch.Tensor] | None = None
        self.bits: dict[str, float] = {}
        self.elements: dict[str, int] = {}
        for name, parameter in trainer.model.named_parameters():
            if parameter.numel() >= MIN_ELEMENTS:
                self.elements[name] = parameter.numel()
                # Runs before DDP sees the gradient.
                parameter.register_hook(partial(self._measure, name, parameter))

    def measure_next(self, measuring: bool) -> None:
        """Whether the next step is measured; between steps."""
        self._residuals = self._feedback.state_dict()["local"] if measuring else None

    def _measure(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._residuals is None:
            return
        # In the order in which it lies in DDP's bucket, which is that of the parameter's memory.
        ordered = torch.empty_like(parameter).copy_(gradient)
        values = ordered.as_strided((parameter.numel(),), (1,))
        residual = self._residuals.pop(name, None)
        if residual is None:
            residual = torch.zeros(parameter.numel())
        quantizer = plan(measure(values, residual), self._state.options.grid, values, residual)
        packet = encode([Segment(values, quantizer, residual)])
        self.bits[name] = 8 * packet.numel() / parameter.numel()


def run_method(method: str, task: Task, steps: int, every: int) -> dict[str, Any]:
    """One training run on every rank; rank 0's figures."""
    trainer = Trainer(task, method)
    meter = LayerMeter(trainer)
    measured: list[int] = []
    bits: list[list[float]] = []
    phases: list[list[float]] = []
    for step in range(steps):
        measuring = step % every == 0
        meter.measure_next(measuring and dist.get_rank() == 0)
        if trainer.state is not None:
            trainer.state.reset_stats()
        trainer.step(*trainer.batch())
        if measuring and trainer.state is not None:
            stats = trainer.state.stats()
            measured.append(step)
            bits.append([meter.bits.get(name, 0.0) for name in meter.elements])
            phases.append([stats["bits_per_element_phase1"], stats["bits_per_element_phase2"]])
    return {
        "method": method,
        "layers": [{"name": name, "elements": count} for name, count in meter.elements.items()],
        "steps": measured,
        "bits_per_element": bits,
        "bits_per_element_phases": phases,
        "test_accuracy": trainer.evaluate(),
    }


def show(runs: list[dict[str, Any]]) -> None:
    """Each layer's mean over the run, and its range."""
    for run in runs:
        phases = torch.tensor(run["bits_per_element_phases"])
        for what, part in (("whole run", phases), ("second half", phases[len(phases) // 2 :])):
            mean = part.mean(0).tolist()
            print(f"{run['method']}, {what}: {mean[0]:.3f} bits in phase 1, {mean[1]:.3f} in phase 2, "
                  f"{sum(mean) / 2:.3f} of both")  # fmt: skip
        print(f"  test accuracy {run['test_accuracy']:.2%}")
        columns = torch.tensor(run["bits_per_element"]).T
        for layer, column in zip(run["layers"], columns, strict=True):
            print(f"  {layer['name']:<32}{layer['elements']:>10}{column.mean():>8.3f}"
                  f"{column.min():>8.3f} .. {column.max():.3f}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["qcomm k=1", "qcomm k=2", "qcomm range c=6"], choices=METHODS)
    parser.add_argument("--model", default="resnet20", choices=MODEL_NAMES)
    parser.add_argument("--dataset", default="digits", choices=DATASET_NAMES)
    parser.add_argument("--steps", type=int, default=220, help="22 are an epoch of digits")
    parser.add_argument("--every", type=int, default=5, help="steps from one measured step to the next")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="six steps: does it run?")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    task = Task(arguments.model, arguments.dataset, batch=4 if arguments.small else BATCH, amp=False)
    steps, every = (6, 2) if arguments.small else (arguments.steps, arguments.every)
    if is_rank():
        rank, _ = start_rank()
        runs = [run_method(method, task, steps, every) for method in arguments.methods]
        if rank == 0:
            print(json.dumps(runs), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return 0
    header = about(task=asdict(task), ranks=arguments.ranks)
    options = ["--methods", *arguments.methods, "--model", arguments.model, "--dataset", arguments.dataset]
    options += ["--steps", str(arguments.steps), "--every", str(arguments.every)]
    options += ["--small"] if arguments.small else []
    try:
        runs = run_ranks(__file__, options, arguments.ranks)
    except RanksError as error:
        print(f"bench_bitrate: {error}", file=sys.stderr)
        return 1
    show(runs)
    write(arguments.json, {**header, "load_after": about()["load"], "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
