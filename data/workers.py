"""Loading processes: a DataLoader whose processes fail with one line, and end with their parent."""

import atexit
import contextlib
import errno
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import cv2
import torch
from torch._C import _error_if_any_worker_fails
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from detector.errors import SIGNALS, UserError
from detector.images import add_remarks
from detector.structures import Batch


class BatchLoader(DataLoader):
    """A DataLoader that reports every failure of its processes between two batches, and never waits for a dead one.

    It raises a UserError of one line if a process raised a UserError or died, or if memory or open files run out. The
    processes' remarks on their images are added to the data set's.
    """

    batch_sampler: Any
    dataset: Any  # a CocoDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch promises its own iterator
        batches: Any = None  # of (Batch, Remarks)
        while True:
            try:
                with _raising_deaths():
                    if batches is None:
                        batches = self._start()
                    batch, remarks = next(batches)
            except StopIteration:
                return
            except UserError as error:
                # A worker sends it as a traceback, whose last line has the message after the class name.
                raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
            except (RuntimeError, OSError, EOFError) as error:
                cause = _cause(error) if self.num_workers else None
                if cause is None:
                    raise
                raise UserError(cause) from None
            add_remarks(self.dataset.image_remarks, remarks)
            yield batch

    def _start(self) -> Iterator[Batch]:
        """Start the worker processes, or let those of the last epoch go on."""
        if self._iterator is not None:
            return super().__iter__()
        # The workers inherit the blocked signals, so none can end one before it ignores them.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if hasattr(signal, "pthread_sigmask") else None
        try:
            batches: Any = super().__iter__()
            # torch would wait ten seconds for each worker that is busy or not notified of the end. None is notified if
            # a failure's traceback holds the loader: the garbage collector closes their queues first.
            weakref.finalize(self, _kill, getattr(batches, "_workers", ()), os.getpid())
            return batches
        finally:
            # At exit, torch and Python would wait as long for busy workers, and send them SIGTERM, which ours ignore.
            # Registered last, our function runs before torch's; Finalize is for parents started by multiprocessing.
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)
            multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
            if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
                # torch's handler would raise anywhere in the main thread: within an optimizer step, or at exit.
                signal.signal(signal.SIGCHLD, _child_ended)
            if blocked is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_waiting = False


@contextlib.contextmanager
def _raising_deaths() -> Iterator[None]:
    """Raise RuntimeError if a worker dies in this block, or has died before it."""
    global _waiting
    _waiting = True
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        _waiting = False


def _child_ended(_number: int, _frame: object) -> None:
    if _waiting:
        _error_if_any_worker_fails()


def _cause(error: Exception) -> str | None:
    """Why no batch arrives from the workers, and what to do about it; None for an error that has another cause."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:  # ancdata: a message arrived without its file descriptors
        return "too many open files: raise the limit (ulimit -n 65536), or lower data.workers"
    if "shared memory" in text or "</torch_" in text:
        with contextlib.suppress(OSError):
            size = shutil.disk_usage("/dev/shm").total / 1e6
            text = f" (/dev/shm has {size:,.0f} MB)"
        return (
            f"shared memory is full{text}, through which loading processes send their images; in Docker give it more "
            "(--shm-size=8g, or --ipc=host), or set data.workers=0"
        )
    if text.startswith("Caught "):  # raised by the data set, within a worker
        return None
    if text.startswith("DataLoader worker (pid"):
        how = text.rpartition(") ")[2].partition(". ")[0].rstrip(".")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN):
        how = f"cannot be started ({error.strerror})"
    elif isinstance(error, (ConnectionError, FileNotFoundError, EOFError)) or text.startswith("Pin memory thread"):
        how = "has ended"  # while sending a batch
    else:
        return None
    return f"a process that loads images {how}, most often for lack of memory; lower data.workers or data.short_side"


def _end_workers() -> None:
    _kill([child for child in multiprocessing.active_children() if child.daemon], os.getpid())


def _kill(workers: Sequence[BaseProcess], parent: int) -> None:
    global _waiting
    if os.getpid() != parent:  # a copy of the loader, in another worker
        return
    waiting, _waiting = _waiting, False  # the end of these must not look like the death of a worker
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(timeout=1)  # a disk that does not answer can hold it longer
    _waiting = waiting


def start_worker(worker: int) -> None:
    # A signal to the whole process group is meant for the training process, which finishes its step and saves.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", _send_error)  # noqa: B010 not a public name
    sys.excepthook = _quiet_if_parent_left
    # The processes run in parallel: threads in them would only compete.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _quiet_if_parent_left(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook of a worker. After the parent has ended, its sending thread fails, which needs no message."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, message: object) -> None:
    """In a worker that cannot send a batch: send the reason, otherwise the parent would wait forever."""
    if not isinstance(message, tuple):  # it was half sent
        os._exit(1)
    queue.put((message[0], ExceptionWrapper(where="in a process that loads images")))
