"""Comparison of a simulated training run with a real one: two processes, DDP, gloo, real sockets.

    python bench/check_simulation.py [--images 2000] [--epochs 2] [--methods fp32 "qcomm k=3.2"] [--json FILE]

Each method trains twice from the same seed: once by :func:`qcomm.recipes.train.train` in two processes, and once by
``simulated_training``. All weights, running statistics and losses, the accuracy and the bits a value must be equal. The
bench fails where one of them is not.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from simulated_exchange import build_exchange
from simulated_training import Setting, simulate

from qcomm.recipes import checkpoint
from qcomm.recipes.config import TrainConfig
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.launch import launch
from qcomm.recipes.train import train

RANKS = 2
METHODS = ("fp32", "qcomm k=1", "qcomm k=2", "qcomm k=3.2", "qcomm k=3.4")
BITS = ("bits_per_element_phase1", "bits_per_element_phase2", "bits_per_element_compressed")


def config_of(setting: Setting, dataset: str, method: str, out: Path) -> TrainConfig:
    """Returns the recipe's configuration of a simulated run."""
    exchange = {}
    if method != "fp32":
        exchange = {"method": "qcomm", "step": float(method.removeprefix("qcomm k="))}
    return TrainConfig(
        dataset=dataset,
        epochs=setting.epochs,
        batch_size=setting.batch,
        stem_stride=2,
        augment=False,
        train_images=setting.images,
        amp="bf16" if setting.amp else "none",
        seed=setting.seed,
        out=out,
        checkpoint_every=setting.epochs,
        **exchange,
    )


def run_real(config: TrainConfig, result: Path) -> None:
    """On every rank: trains; rank 0 writes the result beside the checkpoint."""
    found = train(config)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found.to_json()))


def compare(setting: Setting, dataset: str, method: str) -> dict[str, Any]:
    """Returns the figures of both runs, and which of them differ."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, dataset, method, Path(folder))
        launch(run_real, setting.ranks, 1, config, Path(folder) / "result.json")
        real = json.loads((Path(folder) / "result.json").read_text())
        weights = checkpoint.load(checkpoint.find(Path(folder) / config.slug), config, 0, setting.ranks)[0]["model"]
    exchange = build_exchange(method, setting.ranks)
    simulated = simulate(setting, load_dataset(dataset), exchange, lambda _epoch, _loss: None)
    state = simulated.model.state_dict()
    differing = [name for name, tensor in weights.items() if not torch.equal(tensor, state[name])]
    losses = [record["train_loss"] for record in real["history"]]
    pairs = {
        "train_losses": (losses, simulated.train_losses),
        "test_accuracy": (real["test_accuracy"], simulated.test_accuracy),
    }
    if method != "fp32":
        pairs |= {name: (real["stats"][name], simulated.stats[name]) for name in BITS}
    differing += [name for name, (ours, theirs) in pairs.items() if ours != theirs]
    return {
        "method": method,
        "steps": setting.epochs * setting.steps_per_epoch,
        "tensors": len(weights),
        "differing": differing,
        "bytes_sent": {"real": real["stats"]["bytes_sent"], "packets": simulated.stats["bytes_sent"]},
        **{name: {"real": ours, "simulated": theirs} for name, (ours, theirs) in pairs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fp32", "qcomm k=3.2"])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "simulation_check.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(ranks=RANKS, images=arguments.images, epochs=arguments.epochs)
    rows = []
    for method in arguments.methods:
        rows.append(row := compare(setting, arguments.dataset, method))
        answer = f"different: {', '.join(row['differing'])}" if row["differing"] else "equal, bit for bit"
        print(f"{method:<12} {row['steps']} steps, {row['tensors']} tensors of the model: {answer}", flush=True)
        sent = row["bytes_sent"]
        print(f"{'':<12} bytes sent a rank: {sent['real']:.0f} over sockets, {sent['packets']:.0f} in packets")
    arguments.json.write_text(json.dumps({"torch": torch.__version__, "ranks": RANKS, "rows": rows}, indent=1) + "\n")
    raise SystemExit(1 if any(row["differing"] for row in rows) else 0)


if __name__ == "__main__":
    main()
