import os
import signal

import pytest

from crpt.interrupt import StopRequest

INT, TERM = signal.SIGINT, signal.SIGTERM


def stops_at_once(number: int) -> bool:
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize(
    ("signals", "stopped"),
    [
        ((INT, INT), [False, True]),
        ((INT, TERM, TERM, INT), [False, False, False, True]),
        ((TERM, TERM, INT, TERM, INT), [False, False, False, False, True]),
    ],
)
def test_only_a_second_ctrl_c_stops_at_once(signals, stopped):
    handlers = signal.getsignal(INT), signal.getsignal(TERM)
    with StopRequest() as stop:
        assert not stop.requested
        assert [stops_at_once(number) for number in signals] == stopped
        assert stop.requested
    assert (signal.getsignal(INT), signal.getsignal(TERM)) == handlers
