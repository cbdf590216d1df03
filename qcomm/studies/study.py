"""Definition and execution of a study."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

import qcomm
from qcomm.paper import check_available, save, to_text, write_atomically
from qcomm.studies.records import Records, Run
from qcomm.studies.settings import RunKey, StudySettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = dict[str, Any]
Claim = dict[str, str]
Settings = TypeVar("Settings", bound=StudySettings)


def claim_row(quantity: str, source: str, here: str, verdict: str) -> Claim:
    """Returns a row of a study's table: what a source says of a quantity, what was found, and the verdict."""
    return {"quantity": quantity, "source": source, "here": here, "verdict": verdict}


def runs_of(runs: Sequence[Run], arm: str) -> list[Run]:
    """Returns the runs of an arm, by seed."""
    return [run for run in runs if run["arm"] == arm]


@dataclass(frozen=True)
class Study(Generic[Settings]):
    """One study, of settings that may have fields of their own.

    Attributes:
        name: of the command and of the files.
        help: text of the command; its first line is a sentence.
        arms: names of what is compared; each is run with every seed.
        measure: makes one run, of an arm and a seed; a run has JSON types only.
        claim: makes the sources' claims beside the results found here: ``quantity``, ``source``, ``here``, ``verdict``.
        draw: draws the figure from the document alone.
    """

    name: str
    help: str
    arms: tuple[str, ...]
    measure: Callable[[Settings, RunKey], Run]
    claim: Callable[[Sequence[Run]], list[Claim]]
    draw: Callable[[Document], "Figure"]

    def wanted(self, settings: Settings) -> list[RunKey]:
        """Returns all runs; those of one seed follow each other, so that an unfinished study has whole seeds."""
        return [RunKey(arm, seed) for seed in settings.seeds for arm in self.arms]


def perform(study: Study[Settings], settings: Settings, out: Path, command: list[str]) -> Document:
    """Makes the runs that are not stored yet, and writes ``<out>/<study>.json`` and ``.png``.

    Args:
        study: the study.
        settings: of all runs.
        out: the directory; finished runs are kept in ``<out>/<study>.jsonl``.
        command: command line for the document.

    Returns:
        The document.

    Raises:
        RecipeError: the message names the option, data file, package or stored run at fault.
    """
    check_available()
    records, wanted = Records(out / f"{study.name}.jsonl", settings), study.wanted(settings)
    missing = [key for key in wanted if key not in records.read()]
    if len(missing) < len(wanted):
        print(f"{study.name}: {len(wanted) - len(missing)} of {len(wanted)} runs are stored", flush=True)
    begin = time.perf_counter()
    for number, key in enumerate(missing):
        left = "" if not number else f", {(time.perf_counter() - begin) / number * (len(missing) - number):.0f} s left"
        print(f"{number + 1}/{len(missing)} {key.arm}, seed {key.seed}{left}", flush=True)
        with one_thread():
            result = study.measure(settings, key)
        records.append(key, result)
    stored = records.read()
    runs = [stored[key] for key in wanted]
    document = {
        "study": study.name,
        "command": command,
        "versions": {"qcomm": qcomm.__version__, "torch": str(torch.__version__)},
        "settings": settings.of_a_run(),
        "claims": study.claim(runs),
        "runs": runs,
    }
    write_atomically(out / f"{study.name}.json", to_text(document).encode())
    save(study.draw(document), out / f"{study.name}.png")
    return document


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch to one thread. Their number would change the last bits of a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
