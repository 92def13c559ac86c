"""One thread traces or compiles at a time: both patch torch for all threads meanwhile."""

import contextlib
import os
import threading
from collections.abc import Iterator

lock = threading.RLock()  # a thread that compiles may call what is compiled


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this thread compiles, no other one does, be it ours or a user's."""
    with lock:
        # Here, as it takes seconds to import. Private, and what torch itself takes everywhere else.
        from torch._dynamo import convert_frame

        with getattr(convert_frame, "compile_lock", contextlib.nullcontext()):
            yield


if hasattr(os, "register_at_fork"):
    # A child has but the thread that forks. Were another one compiling, its patches of torch would
    # stay in the child for ever, and so would its lock.
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )
