"""What a signal does to a run."""

import os
import signal

import pytest

from detector.errors import Stopped, run_main
from detector.stop import SIGNALS, Stop


@pytest.mark.parametrize("number", SIGNALS)
def test_it_is_noted_and_leaves_where_it_may(number):
    with Stop() as stop:
        stop.leave()  # nobody asked
        taken = []
        with pytest.raises(Stopped):
            for item in stop.between(range(5)):
                taken.append(item)
                if item == 2:
                    os.kill(os.getpid(), number)
        assert taken == [0, 1, 2] and stop.number == number
        with pytest.raises(Stopped):
            stop.leave()


def test_the_second_signal_is_as_if_nobody_listened():
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is behind & without one
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert [signal.getsignal(number) for number in SIGNALS] == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    signal.signal(signal.SIGINT, ours)


def test_the_exit_code_and_the_line_say_what_happened(capsys):
    def main():
        raise Stopped(signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped by SIGTERM; go on with the same command and --resume\n"
