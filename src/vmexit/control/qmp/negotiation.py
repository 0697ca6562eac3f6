"""The command that every client begins with (docs/interop/qmp-spec, capabilities negotiation)."""

from enum import Enum

from vmexit.control.qmp import errors
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.session import Session


class QMPCapability(Enum):
    OOB = "oob"


@command("qmp_capabilities")
def qmp_capabilities(session: Session, *, enable: list[QMPCapability] | None = None) -> None:
    """No capability is offered, so none can be enabled."""
    if enable:
        raise errors.QmpError(f"Capability {enable[0].value} not available")
    session.negotiated = True
