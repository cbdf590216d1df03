"""Processes that tests started, or that these started, and their ends."""

import os
import select


def is_gone(process, seconds):
    """Tells whether a process has ended, and waits for its end for at most ``seconds``."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
