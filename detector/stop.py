"""SIGINT and SIGTERM as a wish: finish the step, save, leave."""

import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from detector.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Item = TypeVar("Item")


class Stop:
    """A context in which the first of these signals is only noted, for those who look at `number` or call `leave`.

    The second ends the process at once, as it would without us.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # nowhere else can a handler be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self) -> None:
        """Raise Stopped if a signal came."""
        if self.number is not None:
            raise Stopped(self.number)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, and `leave` before each."""
        for item in items:
            self.leave()
            yield item

    def _note(self, number: int, _frame: object) -> None:
        self.number = number
        self.__exit__()
