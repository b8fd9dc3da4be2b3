"""SIGINT and SIGTERM as a wish: finish the step, save, leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from detector.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """A context in which the first of these signals raises Stopped, within `deferred` only once that is left.

    The second ends the process at once, as it would without us.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came
        self._defer = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is only noted; whoever leaves looks at `number`, or calls `leave`."""
        self._defer = True
        try:
            yield
        finally:
            self._defer = False

    def leave(self) -> None:
        """Raise Stopped if a signal came."""
        if self.number is not None:
            raise Stopped(self.number)

    def _ask(self, number: int, _frame: object) -> None:
        self.number = number
        self.__exit__()
        if not self._defer:
            self.leave()
