"""Commands for guest memory, and for the text monitor, which shows it."""

import os
import time
from enum import Enum

from vmexit.control.elf_core import Range, write_core
from vmexit.control.monitor import execute
from vmexit.control.qmp import errors
from vmexit.control.qmp.commands import command
from vmexit.control.qmp.events import DumpCompleted, DumpQueryResult, DumpStatus
from vmexit.control.qmp.session import Session
from vmexit.control.saving import check_vcpu, save_physical, save_virtual
from vmexit.control.sink import Sink
from vmexit.core.errors import VmexitError

_MOST_NAMES = 64
_MASK = (1 << 64) - 1


class DumpGuestMemoryFormat(Enum):
    ELF = "elf"


@command("memsave")
def memsave(
    session: Session, *, val: int, size: int, filename: str, cpu_index: int | None = None
) -> None:
    check_vcpu(session.vm, cpu_index or 0)  # before the file is emptied
    with Sink.to_file(filename, session.served.ending) as sink:
        save_virtual(session.vm, cpu_index or 0, val, size, sink)


@command("pmemsave")
def pmemsave(session: Session, *, val: int, size: int, filename: str) -> None:
    with Sink.to_file(filename, session.served.ending) as sink:
        save_physical(session.vm, val & _MASK, size, sink)


@command("dump-guest-memory")
def dump_guest_memory(
    session: Session,
    *,
    paging: bool,
    protocol: str,
    begin: int | None = None,
    length: int | None = None,
    format: DumpGuestMemoryFormat | None = None,
) -> None:
    if paging:
        raise errors.QmpError("paging: true is not supported; use false, and gdb on the guest")
    if begin is not None and length is None:
        raise errors.missing("length")
    if begin is None and length is not None:
        raise errors.missing("begin")
    only = None
    if begin is not None and length is not None:
        if begin < 0 or length <= 0:
            raise errors.expects("begin", "guest physical addresses with memory behind them")
        only = Range(begin, length)
    with _sink(session, protocol) as sink:
        done = failed = 0
        why: str | None = None
        try:
            done = write_core(session.vm, sink, only)
        except VmexitError as error:
            failed, why = 1, str(error)
            raise
        finally:
            status = DumpStatus.FAILED if failed else DumpStatus.COMPLETED
            result = DumpQueryResult(status, done, done)
            session.served.relay.send(DumpCompleted(result, why), time.time())


def _sink(session: Session, protocol: str) -> Sink:
    kind, _, where = protocol.partition(":")
    if kind == "file" and where:
        return Sink.to_file(where, session.served.ending)
    if kind == "fd":
        return Sink(_taken(session, where), protocol, session.served.ending)
    raise errors.QmpError("Invalid parameter 'protocol'; use file:PATH or fd:NAME")


def _taken(session: Session, name: str) -> int:
    descriptor = session.descriptors.pop(name, None)
    if descriptor is None:
        raise errors.QmpError(f"File descriptor named '{name[:64]}' has not been found")
    return descriptor


@command("getfd")
def getfd(session: Session, *, fdname: str) -> None:
    descriptor = session.take_descriptor()
    if fdname[:1].isdecimal() or len(session.descriptors) >= _MOST_NAMES:
        os.close(descriptor)
        raise errors.expects("fdname", "a name not starting with a digit, one of not too many")
    if (old := session.descriptors.pop(fdname, None)) is not None:
        os.close(old)
    session.descriptors[fdname] = descriptor


@command("closefd")
def closefd(session: Session, *, fdname: str) -> None:
    os.close(_taken(session, fdname))


@command("human-monitor-command")
def human_monitor_command(
    session: Session, *, command_line: str, cpu_index: int | None = None
) -> str:
    try:
        text = execute(session.vm, command_line, cpu_index or 0, session.served.ending)
    except VmexitError as error:
        text = str(error)  # for people, as QEMU has it
    return f"{text}\n" if text else ""
