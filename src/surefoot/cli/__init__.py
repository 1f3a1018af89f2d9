"""The command line: a thin layer over the library, no logic of its own. Importing it imports neither torch nor numpy."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the `surefoot` command; bad input ends in one sentence and exit code 2, never in a traceback."""
    from surefoot.cli.app import app
    from surefoot.errors import SurefootError

    try:
        app()
    except SurefootError as error:
        sys.stderr.write(f"surefoot: {error}\n")
        sys.exit(2)
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:  # typer turns Ctrl-C into this, without a word
            sys.stderr.write("surefoot: interrupted; what was finished and written is kept.\n")
        raise
