"""Entry point of ``python -m qcomm`` and of the script ``qcomm``."""

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"qcomm: the command line needs {' and '.join(missing)}: pip install 'qcomm[train]'", file=sys.stderr)
        raise SystemExit(2)
    from qcomm.cli import app

    app()


if __name__ == "__main__":
    main()
