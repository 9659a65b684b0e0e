"""One Ctrl-C is noted, a second one stops at once, and afterwards signals are as they were."""

import os
import signal
import threading

import pytest

from etpo.engine.interrupt import interruptible, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_answered_and_the_second_stops(number, capfd) -> None:
    before = signal.getsignal(number)
    with interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), number)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert "once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_while_a_run_is_opened_other_signals_are_as_ctrl_c(number) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stoppable():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found = []

    def look() -> None:
        with interruptible() as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, before)]
