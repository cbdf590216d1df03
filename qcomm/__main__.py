"""Entry point of ``python -m qcomm`` and of the script ``qcomm``."""

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(
            f"qcomm: {names} came with qcomm and cannot be imported: pip install {' '.join(missing)}", file=sys.stderr
        )
        raise SystemExit(2)
    from qcomm.cli import app

    app()


if __name__ == "__main__":
    main()
