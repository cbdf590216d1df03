"""The command line ``qcomm``: one module per command, and ``main``, which assembles them."""

from qcomm.cli.main import app

__all__ = ["app"]
