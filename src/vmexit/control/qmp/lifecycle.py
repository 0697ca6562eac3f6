"""Commands that change what the machine does."""

from vmexit.control.qmp.commands import command
from vmexit.control.qmp.session import Session
from vmexit.control.steering import resume
from vmexit.machine.stop import StopReason


@command("stop")
def stop(session: Session) -> None:
    session.vm.pause()


@command("cont")
def cont(session: Session) -> None:
    resume(session.vm)


@command("system_reset")
def system_reset(session: Session) -> None:
    session.vm.reset()


@command("system_powerdown")
def system_powerdown(session: Session) -> None:
    session.vm.press_power_button()


@command("inject-nmi")
def inject_nmi(session: Session) -> None:
    session.vm.inject_nmi()


@command("quit")
def quit(session: Session) -> None:
    session.vm.stop(StopReason.QUIT)
