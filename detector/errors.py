"""How a command ends: with a user's error in one line, by a signal, or with a bug's traceback."""

import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# Characters that would break one-line messages, and the drawing and logging of names.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


MAX_SHOWN = 300  # characters of a message


class UserError(Exception):
    """An error in a config, annotation file, image, checkpoint or flag.

    The message is one line: what was found, where, and what to do about it.
    """


class LostProcess(Exception):
    """Another process of the group has ended, so this one cannot go on."""


class Stopped(BaseException):
    """A signal asked the process to end. Like KeyboardInterrupt it is no Exception, so `except Exception` misses it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def one_line(text: str) -> str:
    """The text with control characters escaped; a long text loses its middle."""
    text = CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 2 :]}"


def counted(count: int, what: str) -> str:
    """`1 image`, `2,000 boxes`."""
    ending = "" if count == 1 else "es" if what.endswith(("x", "s")) else "s"
    return f"{count:,} {what}{ending}"


# Signals that ask a process to end, from: Ctrl-C; scancel, timeout, systemd, torchrun; a closed terminal.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None  # as signal.signal takes it


def listen(handler: Handler, *signals: int) -> dict[int, Handler]:
    """Install the handler for these signals; returns the earlier handlers. Signals that nohup ignores stay ignored."""
    hang_up = getattr(signal, "SIGHUP", None)
    heard = [number for number in signals if number != hang_up or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class _Output(io.FileIO):
    """Standard output or error. A failed write does not end the command, because its results are files.

    If the reader is gone (a closed terminal, a pipe into head), it stays silent. `failure` keeps any other error, such
    as a full disk, for the end of the command.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                self.failure = self.failure or error
            return len(data)


def _robust(stream: Any) -> Any:
    """Standard output or error that does not raise for characters it cannot encode, or for failed writes."""
    if stream is None:  # closed by the parent process
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's is none
        return stream
    stream.reconfigure(errors="backslashreplace")
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):  # a test's, or Windows' console
        return stream
    stream.flush()
    output = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        output if stream.write_through else io.BufferedWriter(output),
        stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _check_output() -> None:
    """Raise UserError if a part of the output could not be written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        buffer = getattr(stream, "buffer", None)
        if failure := getattr(getattr(buffer, "raw", buffer), "failure", None):
            raise UserError(f"all is done, but not all of what it says could be printed ({failure.strerror})")


_stopped: Stopped | None = None  # kept, because a library may replace an error from its callbacks by another


def run_main(main: Callable[[], None], *, after_stop: str = "") -> None:
    """Run an entry point and exit: 0 when done, 2 for a user's error, 1 for a fault, 128 + its number for a signal.

    Called only by the scripts that a user starts. A user's error, and a fault that we foresaw (a loss or a model's
    output that is not finite), end in one line; anything else keeps its traceback, because it is a bug. `after_stop`
    says how to continue after a signal.

    Printing never ends a command: a character that the terminal or log file cannot encode is printed as \\u7ec6, and
    output without a reader (`| head -1`) is dropped while the work goes on. A `~` at the start of an argument, or of a
    value as in `--output=~/x`, is the home folder, because not every shell expands it.
    """
    global _stopped
    sys.stdout, sys.stderr = _robust(sys.stdout), _robust(sys.stderr)
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    sys.unraisablehook, _stopped = _again, None
    try:
        listen(_stop, *SIGNALS[1:])  # Python raises KeyboardInterrupt for the first
        try:
            main()
            _check_output()
        finally:
            listen(_ignore, *SIGNALS[1:])  # it is ending already
    except (UserError, FloatingPointError, LostProcess) as error:
        line = "error: " + CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(error))
        code = 2 if isinstance(error, UserError) else 1
    except BaseException as error:
        stopped = Stopped(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else _stopped or error
        if not isinstance(stopped, Stopped):
            raise
        line, code = f"{stopped}{after_stop}", 128 + stopped.number
    else:
        return
    sys.stderr.write(f"{line}\n")  # in one piece: print's parts may mix with those of other processes
    sys.exit(code)


def _stop(number: int, _frame: object) -> None:
    listen(_ignore, *SIGNALS[1:])  # only the first counts: torchrun passes on signals that the whole group has received
    global _stopped
    _stopped = Stopped(number)
    raise _stopped


def _again(unraisable: Any) -> None:
    """For sys.unraisablehook: Python cannot propagate a Stopped from a destructor, so raise it a moment later."""
    if not isinstance(unraisable.exc_value, Stopped):
        return sys.__unraisablehook__(unraisable)
    if signal.getsignal(signal.SIGTERM) is _ignore:
        listen(_stop, *SIGNALS[1:])
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()


def _ignore(_number: int, _frame: object) -> None:
    """Used instead of SIG_IGN, which programs that we start would inherit."""


def _at_home(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if flag.startswith("--"):
        return flag + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)
