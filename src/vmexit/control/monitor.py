"""A monitor for people: QEMU's commands as lines of text, for QMP and for gdb's `monitor`."""

from collections.abc import Callable
from typing import NamedTuple

from vmexit import __version__
from vmexit.backends.wait import Ending, never
from vmexit.control import hardware
from vmexit.control.expression import evaluate
from vmexit.control.memory_view import Format, show
from vmexit.control.page_view import show_mappings
from vmexit.control.saving import check_vcpu, save_physical, save_virtual
from vmexit.control.sink import Sink
from vmexit.control.steering import RunStatus, resume, run_status
from vmexit.core.errors import VmexitError, quoted, shown
from vmexit.machine.config import parse_size
from vmexit.machine.machine import Machine
from vmexit.machine.stop import StopReason

_LONGEST = 4096


class _Asked(NamedTuple):
    """A command with what it is about: `words` are its arguments, `form` what follows a slash."""

    vm: Machine
    vcpu: int
    words: list[str]
    form: str
    ending: Ending


_Function = Callable[[_Asked], str]


class _Command(NamedTuple):
    usage: str
    help: str
    function: _Function


_commands: dict[str, _Command] = {}


def _command(usage: str, help: str) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        name = usage.partition(" ")[0].partition("/")[0]
        if name == "info":
            name = " ".join(usage.split()[:2])
        _commands[name] = _Command(usage, help, function)
        return function

    return register


def execute(vm: Machine, line: str, vcpu: int = 0, ending: Ending = never) -> str:
    """What the command `line` answers, for `vcpu` where it is about one; lines without the last
    line break. Raises VmexitError for what cannot be done, or takes longer than until `ending()`.
    """
    check_vcpu(vm, vcpu)
    if len(line) > _LONGEST:
        raise VmexitError(f"a command of {len(line)} characters is too long; use {_LONGEST}")
    words = line.split()
    if not words:
        return ""
    name, _, form = words.pop(0).partition("/")
    if name == "info" and words:
        name = f"info {words.pop(0)}"
    command = _commands.get(name)
    if command is None:
        raise VmexitError(f"unknown command: {quoted(name)}; {_hint(name)}")
    return command.function(_Asked(vm, vcpu, words, form, ending))


def _hint(name: str) -> str:
    import difflib  # slow to load

    close = difflib.get_close_matches(name, _commands, 1)
    return f"did you mean {close[0]}?" if close else "help shows all"


def _number(asked: _Asked, count: int = 1, at: int = 0) -> int:
    """An address or a size among the arguments, of which there are `count`."""
    if len(asked.words) < count:
        raise VmexitError("there is an argument too few; see help")
    # The last one may have spaces in it: $rsp + 8.
    text = " ".join(asked.words[at:]) if count == at + 1 else asked.words[at]
    return evaluate(asked.vm, text, asked.vcpu)


@_command("help [COMMAND]", "show the commands, or one of them")
def _help(asked: _Asked) -> str:
    wanted = " ".join(asked.words)
    found = [c for name, c in sorted(_commands.items()) if not wanted or name.startswith(wanted)]
    if not found:
        raise VmexitError(f"unknown command: {quoted(wanted)}; {_hint(wanted)}")
    return "\n".join(f"{c.usage} -- {c.help}" for c in found)


@_command("info", "show what there is to be shown")
def _info(asked: _Asked) -> str:
    return _help(asked._replace(words=["info"]))


@_command("info version", "show the version of vmexit")
def _version(asked: _Asked) -> str:
    return f"vmexit {__version__}"


@_command("info status", "show whether the machine runs")
def _status(asked: _Asked) -> str:
    status = run_status(asked.vm)
    if status is RunStatus.RUNNING:
        return "VM status: running"
    more = f" ({status.value})" if status is not RunStatus.PAUSED else ""
    return f"VM status: paused{more}"


@_command("info registers", "show the registers of the vCPU; -a: of all of them")
def _registers(asked: _Asked) -> str:
    vm = asked.vm
    numbers = range(len(vm.vcpus)) if "-a" in asked.words else (asked.vcpu,)
    with vm.paused():
        return "\n\n".join(f"CPU#{number}\n{vm.dump(number)}" for number in numbers)


@_command("info cpus", "show the vCPUs, where each is, and the threads that run them")
def _cpus(asked: _Asked) -> str:
    vm = asked.vm
    with vm.paused():
        return "\n".join(
            f"{'*' if vcpu.index == asked.vcpu else ' '} CPU #{vcpu.index}: "
            f"pc=0x{vcpu.regs.rip:016x} thread_id={vm.thread_id(vcpu.index)}"
            for vcpu in vm.vcpus
        )


@_command(
    "info mem", "show which virtual addresses the vCPU's page tables map, and with what rights"
)
def _mem(asked: _Asked) -> str:
    with asked.vm.paused():
        return show_mappings(asked.vm.memory, asked.vm.vcpus[asked.vcpu].regs.system())


@_command("info memory", "show where the guest has RAM and ROM, by guest physical address")
def _memory(asked: _Asked) -> str:
    return "\n".join(
        f"{region.gpa:016x}-{region.end:016x} {'ROM' if region.readonly else 'RAM'}"
        for region in asked.vm.memory.regions
    )


@_command("info block", "show the disks")
def _block(asked: _Asked) -> str:
    lines = []
    for disk in hardware.disks(asked.vm):
        drive = disk.drive
        kind = drive.format or ("vhost-user" if drive.socket else "raw")
        lines.append(f"{disk.device}: {shown(disk.where)} ({kind}{', read-only' * drive.readonly})")
    return "\n".join(lines)


@_command("info chardev", "show where the serial port and the consoles lead to")
def _chardev(asked: _Asked) -> str:
    return "\n".join(f"{one.label}: {shown(one.where)}" for one in hardware.channels(asked.vm))


@_command("info balloon", "show how much memory the balloon leaves to the guest")
def _info_balloon(asked: _Asked) -> str:
    return f"balloon: actual={hardware.memory_left(asked.vm) >> 20}"


@_command("balloon SIZE", "ask the guest to do with so many MiB of memory")
def _balloon(asked: _Asked) -> str:
    if len(asked.words) != 1:
        raise VmexitError("balloon takes a size; use balloon 64")
    size = asked.words[0]
    hardware.leave_memory(asked.vm, parse_size(f"{size}M" if size.isdecimal() else size))
    return ""


@_command("x/FMT ADDRESS", "show memory by virtual address: x/4xw $rsp, x/10i $rip")
def _x(asked: _Asked) -> str:
    return _examine(asked, physical=False)


@_command("xp/FMT ADDRESS", "show memory by guest physical address: xp/16xb 0x7c00")
def _xp(asked: _Asked) -> str:
    return _examine(asked, physical=True)


def _examine(asked: _Asked, *, physical: bool) -> str:
    form = Format.parse(asked.form)
    with asked.vm.paused():
        return show(asked.vm, _number(asked), form, asked.vcpu, physical=physical)


@_command("gva2gpa ADDRESS", "translate a virtual address by the vCPU's page tables")
def _gva2gpa(asked: _Asked) -> str:
    with asked.vm.paused():
        gpa = asked.vm.translate(_number(asked), asked.vcpu)
    return "Unmapped" if gpa is None else f"gpa: {gpa:#x}"


@_command("gpa2hva ADDRESS", "show where in this process the memory at a guest physical address is")
def _gpa2hva(asked: _Asked) -> str:
    with asked.vm.paused():
        gpa = _number(asked)
        return f"Host virtual address for {gpa:#x} is {asked.vm.memory.hva(gpa):#x}"


@_command("print EXPRESSION", "show the value of a sum of numbers and registers: $rsp + 0x10")
def _print(asked: _Asked) -> str:
    with asked.vm.paused():
        return f"{_number(asked):#x}"


@_command("memsave ADDRESS SIZE FILE", "write memory by virtual address to a file")
def _memsave(asked: _Asked) -> str:
    with asked.vm.paused():
        gva, size = _number(asked, 3, 0), _number(asked, 3, 1)
    with Sink.to_file(" ".join(asked.words[2:]), asked.ending) as sink:
        save_virtual(asked.vm, asked.vcpu, gva, size, sink)
    return ""


@_command("pmemsave ADDRESS SIZE FILE", "write memory by guest physical address to a file")
def _pmemsave(asked: _Asked) -> str:
    with asked.vm.paused():
        gpa, size = _number(asked, 3, 0), _number(asked, 3, 1)
    with Sink.to_file(" ".join(asked.words[2:]), asked.ending) as sink:
        save_physical(asked.vm, gpa, size, sink)
    return ""


@_command("stop", "pause the machine")
def _stop(asked: _Asked) -> str:
    asked.vm.pause()
    return ""


@_command("cont", "let it go on")
def _cont(asked: _Asked) -> str:
    resume(asked.vm)
    return ""


@_command("system_reset", "begin again, as by the reset button")
def _reset(asked: _Asked) -> str:
    asked.vm.reset()
    return ""


@_command("system_powerdown", "press the power button")
def _powerdown(asked: _Asked) -> str:
    asked.vm.press_power_button()
    return ""


@_command("nmi", "a non-maskable interrupt for each vCPU")
def _nmi(asked: _Asked) -> str:
    asked.vm.inject_nmi()
    return ""


@_command("quit", "end the program with status 0")
def _quit(asked: _Asked) -> str:
    asked.vm.stop(StopReason.QUIT)
    return ""
