"""One JSON of what bench/gpu_suite.sh left in a folder. Needs nothing but Python, for the stages may all have failed.

python bench/gpu_collect.py FOLDER JSON
"""

import json
import sys
from pathlib import Path

LOG_CHARACTERS = 3000


def collect(folder: Path) -> dict[str, object]:
    """The stages, a line each of ``name, exit status, seconds, note``, the ends of their logs, and the bench."""
    stages = {}
    for line in (folder / "stages.tsv").read_text().splitlines():
        name, status, seconds, note = line.split("\t")
        log = folder / f"{name}.log"
        tail = log.read_text(errors="replace")[-LOG_CHARACTERS:] if log.exists() else ""
        stages[name] = {"status": int(status), "seconds": int(seconds), "note": note, "log": tail}
    bench = folder / "bench.json"
    return {"stages": stages, "bench": json.loads(bench.read_text()) if bench.exists() else None}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(collect(Path(sys.argv[1])), indent=1) + "\n")
