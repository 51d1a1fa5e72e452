"""A signal sets a mark; a second one ends the process, unless several processes have to end together."""

import signal

import pytest

from bitorch_engine.cli.interrupt import Interrupt


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_gives_its_exit_code(number: signal.Signals, exit_code: int) -> None:
    before = signal.getsignal(number)
    with Interrupt(patient=False) as interrupt:
        assert not interrupt()
        signal.raise_signal(number)
        assert interrupt()
        assert interrupt.exit_code == exit_code
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once_unless_patient() -> None:
    for patient in (True, False):
        with Interrupt(patient=patient):
            signal.raise_signal(signal.SIGINT)
            if patient:
                signal.raise_signal(signal.SIGINT)
            else:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
