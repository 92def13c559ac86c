"""Stopping between two steps instead of in the middle of one."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

_MESSAGE = b"\nStopping after this step; once more to stop without saving.\n"


class StopRequest:
    """While entered, the first SIGINT (Ctrl-C) or SIGTERM is noted rather than obeyed.

    Args:
        announced: Whether to say so when it comes.

    Attributes:
        received: The signal that came, if one did.
    """

    def __init__(self, *, announced: bool = True) -> None:
        self._announced = announced
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        # print could be what the signal interrupted.
        if self._announced:
            os.write(2, _MESSAGE)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
