"""Results on disk: a file per run, so that an interrupted experiment can resume, and a document per experiment."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import qcomm
from qcomm.paper.settings import Settings
from qcomm.recipes import RecipeError

Document = dict[str, Any]

# The fields of every document; docs/paper.md describes them.
DOCUMENT_FIELDS = ("experiment", "command", "versions", "settings", "claims", "summary", "runs")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file such that every reader, even after a crash, sees either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)  # mkstemp's own mode is for its owner only
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


class Cells:
    """The finished runs, one JSON file each.

    Args:
        folder: directory of the files, made when the first one is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, kind: str, settings: Settings) -> Path:
        """Returns the path of a run's file. ``kind`` separates measurements with equal settings."""
        return self._folder / f"{kind}-{settings.slug}.json"

    def find(self, kind: str, settings: Settings) -> dict[str, Any] | None:
        """Returns the stored run, with its ``settings``, or None.

        Raises:
            RecipeError: the file is unreadable, or of other settings; the message names the cause and the remedy.
        """
        path = self.path(kind, settings)
        try:
            stored = json.loads(path.read_text())
            difference = settings.difference(stored["settings"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is not a stored run ({error}): remove it, or give another --out") from error
        if difference is not None:
            raise RecipeError(
                f"{path} holds a run of other settings: {difference}; repeat those, remove it, or give another --out"
            )
        return dict(stored)

    def store(self, kind: str, settings: Settings, result: dict[str, Any]) -> None:
        """Writes a run's file."""
        content = {"settings": settings.to_json(), **result}
        write_atomically(self.path(kind, settings), (json.dumps(content, allow_nan=False) + "\n").encode())


def document(
    experiment: str,
    command: list[str],
    settings: Settings,
    runs: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    claims: list[dict[str, str]],
) -> Document:
    """Builds the document of an experiment, with the fields of ``DOCUMENT_FIELDS``.

    Args:
        experiment: name of the experiment.
        command: the command line.
        settings: the settings common to all runs; each run names the others.
        runs: stored runs, reduced to the experiment's quantities.
        summary: the rows of the experiment's table.
        claims: entries of the form ``{"quantity", "paper", "here"}``.
    """
    common = settings.to_json()
    for name in ("seed", "init", "exchange"):
        del common[name]
    return {
        "experiment": experiment,
        "command": command,
        "versions": {"qcomm": qcomm.__version__, "torch": str(torch.__version__)},
        "settings": common,
        "claims": claims,
        "summary": summary,
        "runs": [
            {name: run["settings"][name] for name in ("seed", "init", "exchange")}
            | {name: value for name, value in run.items() if name != "settings"}
            for run in runs
        ],
    }


def to_text(document: Document) -> str:
    """Returns JSON with a line for each field and for each entry of a list: a run is a line."""
    lines = []
    for name, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = ",\n".join("  " + json.dumps(entry, allow_nan=False) for entry in value)
            lines.append(f" {json.dumps(name)}: [\n{entries}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
