"""Where commands print."""

from __future__ import annotations

import os
import sys

from rich.console import Console

_PIPED_WIDTH = 200


def standard_output() -> Console:
    """Standard output, as wide as the terminal; a file or a pipe folds no table, unless $COLUMNS says so."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_PIPED_WIDTH if wide else None)
