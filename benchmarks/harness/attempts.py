"""What may fail, or never end, without ending the run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class TookTooLong(BaseException):
    """No ``Exception``, or compilers would catch it and raise one of theirs."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TookTooLong` in a block that takes longer, once it runs Python again."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise TookTooLong(f"more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def described(error: BaseException) -> str:
    """Its type and first line; more, if that line ends in a colon."""
    said = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if not line.endswith(":"):
            break
    return ": ".join([type(error).__name__, " ".join(said)]) if said else type(error).__name__
