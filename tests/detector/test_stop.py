"""The effect of a signal on a command and on a run."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detector.errors import SIGNALS, Stopped
from detector.stop import Stop

ROOT = Path(__file__).parents[2]


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_the_loop_between_two_items(number):
    items = []
    with Stop() as stop:
        with pytest.raises(Stopped) as stopped:
            for item in stop.between(range(5)):
                if item == 2:
                    ask(number)
                items.append(item)
        assert items == [0, 1, 2] and stop.number == stopped.value.number == number
        with pytest.raises(Stopped):
            items.extend(stop.between(range(5)))
    assert items == [0, 1, 2]


def test_a_signal_is_noted_after_the_last_item_too():
    with Stop() as stop, pytest.raises(Stopped):
        for _ in stop.between(range(1)):
            ask()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_a_wait(number):
    items = []

    def slow():
        yield 1
        ask(number)
        items.append("the next item")  # it would never come from a disk that is gone

    with Stop() as stop, pytest.raises(Stopped):
        items.extend(stop.between(slow()))
    assert items == [1]


def test_repeated_signals_interrupt_nothing_but_ctrl_c_does():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background commands without this handler
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):  # the group's, torchrun's, the shell's
            ask(number)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            ask(signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_exit_code_and_the_line_say_what_happened(command):
    def main():
        try:
            ask(signal.SIGTERM)
        finally:
            ask(signal.SIGTERM)  # again, while the command ends

    assert command(main) == (128 + signal.SIGTERM, "", "stopped by SIGTERM\n")


class Panic(BaseException):
    """Like the panic of libraries in Rust."""


def test_a_library_that_raises_another_error_does_not_hide_the_signal(command):
    def main():
        try:
            ask()
        except BaseException:
            raise Panic from None

    assert command(main) == (128 + signal.SIGTERM, "", "stopped by SIGTERM\n")
    with pytest.raises(Panic):
        command(lambda: (_ for _ in ()).throw(Panic))


def test_a_signal_is_not_caught_as_an_error_of_the_running_code(command):
    def main():
        try:
            ask(signal.SIGHUP)
        except Exception:  # as code around decoders does
            print("caught")

    assert command(main) == (128 + signal.SIGHUP, "", "stopped by SIGHUP\n")


class Destructed:
    def __del__(self):
        ask()
        for _ in range(10):  # Python handles the signal here and cannot raise its error
            pass


@pytest.mark.parametrize("running", [False, True])
def test_a_signal_in_a_destructor_is_not_lost(command, within, running):
    def wait():
        Destructed()
        while True:
            time.sleep(0.001)
            yield

    def main():
        try:
            with Stop() if running else contextlib.nullcontext() as stop, within(10):
                list(stop.between(wait()) if running else wait())
        except AssertionError:
            print("it came too late")

    assert command(main) == (128 + signal.SIGTERM, "", "stopped by SIGTERM\n")


def test_ctrl_c_before_a_run_begins_stops_the_command(command):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert command(lambda: ask(signal.SIGINT)) == (128 + signal.SIGINT, "", "stopped by SIGINT\n")


def test_nohup_is_respected(command):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def main():
        with Stop() as stop:
            ask(signal.SIGHUP)
            assert stop.number is None

    assert command(main) == (0, "", "")


PRINTS = """
import fcntl, sys, termios
from detector.errors import run_main
from detector.stop import Stop

def main():
    with Stop() as stop:
        try:
            for number in stop.between(iter(int, 1)):
                print("step", file=sys.stderr, flush=True)
        finally:
            print("saving", flush=True)
            open(sys.argv[1], "w").write("saved")

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # as in a shell: the terminal is that of the process
run_main(main)
"""


def test_a_closed_terminal_does_not_keep_a_run_from_saving(tmp_path, within):
    """Printing to a closed terminal is an error."""
    terminal, tty = pty.openpty()
    arguments = [sys.executable, "-c", PRINTS, tmp_path / "x"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=tty, stdout=tty, stderr=tty, start_new_session=True)
    os.close(tty)
    with within(60):
        assert b"step" in os.read(terminal, 100)
        os.close(terminal)
        assert process.wait() == 128 + signal.SIGHUP
    assert (tmp_path / "x").read_text() == "saved"
