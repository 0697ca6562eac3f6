"""What a user wants to come after the guest's end."""

import pytest

from vmexit import After, ConfigError, StopReason
from vmexit.machine.actions import Actions
from vmexit.machine.stop import Stop


def test_nothing_said_means_the_end():
    for reason in StopReason:
        assert Actions.parse([]).decide(Stop(reason)) is After.END


def test_each_has_its_own():
    actions = Actions.parse(["reboot=reset,shutdown=pause", "panic=pause"])
    for reason, after in {
        StopReason.HALT: After.HOLD,
        StopReason.POWEROFF: After.HOLD,
        StopReason.DEBUG_EXIT: After.HOLD,
        StopReason.RESET: After.RESET,
        StopReason.SHUTDOWN: After.HOLD,
        StopReason.GUEST_CRASH: After.HOLD,
        StopReason.DEBUG: After.END,
    }.items():
        assert actions.decide(Stop(reason)) is after


@pytest.mark.parametrize("text", ["", "reboot", "reboot=foo", "foo=pause", "reboot=", "a=b=c"])
def test_what_cannot_be(text):
    with pytest.raises(ConfigError):
        Actions.parse([text])
