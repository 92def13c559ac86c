"""What the user can put right: shown as one line, never as a traceback."""

import sys


class UsageError(Exception):
    """A mistake in the options or the files given."""


def complain(message: object) -> None:
    """Print an error as one line."""
    print(f"gcfunc: error: {message}", file=sys.stderr)  # noqa: T201
