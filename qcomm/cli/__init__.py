"""The command line ``qcomm``: one module a command, of which ``main`` makes one application."""

from qcomm.cli.main import app

__all__ = ["app"]
