"""What a user can mend, told in one line."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable

# In a name or a message these would break the line it is told in, and what draws and logs it.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """A slip in a config, annotation file, image, checkpoint or flag.

    The message is one line: what was found, where, and what to do about it.
    """


class Stopped(Exception):
    """A signal asked the process to end, and what there is to save is saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point and exit: 0 when done, 2 for a user's slip, 1 for a fault, 128 + its number for a signal.

    Called only by the scripts that a user starts. A user's error, and a fault that we foresaw (a loss or a model's
    output that is not finite), end in one line; anything else keeps its traceback, since it is ours to fix.

    Printing never fails for a letter that the terminal or the log file has no code for; it is printed as \\u7ec6. A `~`
    that starts an argument, or a value as in `--output=~/x`, is the home folder: not every shell expands it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="backslashreplace")
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        main()
    except (UserError, FloatingPointError) as error:
        print("error:", CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(error)), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Stopped as stopped:
        print(f"{stopped}; go on with the same command and --resume", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)


def _at_home(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if flag.startswith("--"):
        return flag + equals + os.path.expanduser(value)
    return os.path.expanduser(argument)
