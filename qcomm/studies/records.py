"""Finished runs of a study, one JSON line each, so that an interrupted study goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from qcomm.recipes import RecipeError
from qcomm.studies.settings import RunKey, StudySettings

Run = dict[str, Any]


class Records:
    """The finished runs in a file.

    A process may be killed while it writes: an unfinished last line is dropped, and its run is made again.

    Args:
        path: of the file; its folder is made when the first run is stored.
        settings: of the study, with which stored runs are compared.
    """

    def __init__(self, path: Path, settings: StudySettings) -> None:
        self._path, self._settings = path, settings.of_a_run()

    def read(self) -> dict[RunKey, Run]:
        """Returns the finished runs.

        Raises:
            RecipeError: a line is no run, or one of other settings; the message names the line and the remedy.
        """
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{self._path} cannot be read ({error}): remove it, or give another --out") from error
        lines = text.split("\n")
        return dict(self._parse(number, line) for number, line in enumerate(lines[:-1], 1))

    def _parse(self, number: int, line: str) -> tuple[RunKey, Run]:
        try:
            run = json.loads(line)
            key, stored = RunKey(str(run["arm"]), int(run["seed"])), dict(run.pop("settings"))
        except (ValueError, KeyError, TypeError) as error:
            text = f"{self._path}:{number} is not a stored run ({error!r}): remove the line, or give another --out"
            raise RecipeError(text) from error
        for name, value in self._settings.items():
            if stored.get(name) != value:
                raise RecipeError(
                    f"{self._path}:{number} is a run of other settings: {name} is {value!r} here and "
                    f"{stored.get(name)!r} there; repeat those, remove the file, or give another --out"
                )
        return key, run

    def append(self, key: RunKey, result: Run) -> None:
        """Adds a finished run."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**key._asdict(), "settings": self._settings, **result}, allow_nan=False) + "\n"
        with self._path.open("a+b") as stream:
            _drop_unfinished(stream.fileno(), self._path)
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())


def _drop_unfinished(handle: int, path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(handle, whole)
