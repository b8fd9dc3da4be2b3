"""Graceful shutdown: a signal ends a run between two steps, once it is saved."""

import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from detector.errors import SIGNALS, Handler, Stopped, listen

Item = TypeVar("Item")


class Stop:
    """A context that notes the first of SIGNALS in `number`, and raises Stopped only in `between`.

    A second Ctrl-C ends the process at once, as usual in Python. SIGTERM and SIGHUP may come more than once: torchrun
    passes on signals that the whole group has received already.
    """

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came
        self._before: dict[int, Handler] = {}
        self._waiting = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            self._before = listen(self._note, *SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items. After a signal, raises Stopped instead of the next item, even while waiting for it."""
        iterator = iter(items)
        while True:
            self._waiting = True
            try:
                if self.number is not None:
                    raise Stopped(self.number)
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def _note(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number = number
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if self._waiting:
            raise Stopped(self.number)
