"""Builds the kernel, boots it once, and gives each test a clone of it that waits at its prompt."""

import subprocess
from pathlib import Path

import pytest

import vmexit

HERE = Path(__file__).resolve().parent
KERNEL = HERE / "build" / "kernel.elf"

PROMPT = "k> "
DONE_PORT = 0x80  # where boot.S has functions return to that a test has called
SCRATCH = 0x2_0000  # low memory, which the kernel leaves alone: for arguments and code
SCRATCH_END = 0x8_0000
SECONDS = 20  # so long may anything take that is quick


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # not in each worker of pytest-xdist
        subprocess.run(["make", "--silent", "-C", HERE / "kernel"], check=True)


@pytest.fixture(scope="session")
def vm_boot() -> dict[str, object]:
    return {"kernel": KERNEL, "memory": "16M", "until": PROMPT, "timeout": SECONDS}


@pytest.fixture
def kernel(booted: vmexit.Machine) -> "Kernel":
    return Kernel(booted)


class Kernel:
    """The kernel in a clone: call its functions, read its variables, type to its shell."""

    def __init__(self, vm: vmexit.Machine) -> None:
        self.vm = vm
        self._scratch = SCRATCH

    # The shell

    def shell(self, line: str) -> str:
        """What the command `line` prints."""
        self.vm.console.send(line + "\n")
        self.vm.console.expect("\n", SECONDS)  # the echo of what was typed
        return self.vm.console.expect(PROMPT, SECONDS).removesuffix(PROMPT)

    # Memory

    def address(self, symbol: str) -> int:
        found = self.vm.symbols.address(symbol)
        assert found is not None, f"the kernel has no symbol {symbol}"
        return found

    def variable(self, symbol: str, index: int = 0) -> int:
        """The 64 bits at `symbol`, or those of its element `index`."""
        return self.vm.memory.read_u64(self.address(symbol) + 8 * index)

    def room(self, size: int) -> int:
        """The address of `size` bytes, which are zero and nobody else's."""
        at = self._scratch
        self._scratch += -(-size // 16) * 16
        assert self._scratch <= SCRATCH_END, "a test wants more memory than SCRATCH has"
        return at

    def put(self, data: bytes | str) -> int:
        """The address of `data` in the guest; a text ends with a zero byte."""
        raw = data.encode() + b"\0" if isinstance(data, str) else data
        at = self.room(len(raw))
        self.vm.memory.write(at, raw)
        return at

    def text(self, at: int) -> str:
        """The text at an address, up to its zero byte."""
        return self.vm.memory.read(at, 256).partition(b"\0")[0].decode()

    # Functions

    def call(self, function: str | int, *arguments: int) -> int:
        """What `function`, a symbol or an address, returns in RAX; registers stay as they were."""
        stop, result = self._call(function, arguments)
        assert stop.reason is vmexit.StopReason.UNTIL, (
            f"{function} did not return: {stop.summary()}"
        )
        return result

    def call_int(self, function: str, *arguments: int) -> int:
        """As `call()`, for a function whose result is an int of C."""
        low = self.call(function, *arguments) & 0xFFFF_FFFF
        return low - (low >> 31 << 32)

    def call_bool(self, function: str, *arguments: int) -> bool:
        """As `call()`, for a function whose result is a bool of C: only AL counts."""
        return bool(self.call(function, *arguments) & 0xFF)

    def panic(self, function: str | int, *arguments: int) -> str:
        """What the kernel says as it panics in `function`."""
        stop, _ = self._call(function, arguments)
        assert stop.reason is vmexit.StopReason.DEBUG_EXIT, f"no panic: {stop.summary()}"
        said = self.vm.console.output.rpartition("panic: ")[2]
        return said.strip()

    def _call(self, function: str | int, arguments: tuple[int, ...]) -> tuple[vmexit.Stop, int]:
        registers = self.vm.vcpus[0].regs
        before = registers.general()
        stack = (before["rsp"] - 256 & ~0xF) - 8  # as behind a CALL
        self.vm.memory.write_u64(stack, self.address("call_done"))
        names = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
        registers.update(
            rip=function if isinstance(function, int) else self.address(function),
            rsp=stack,
            rax=0,
            **dict(zip(names, arguments, strict=False)),
        )
        stop = self.vm.run_until(pio=DONE_PORT, timeout=SECONDS)
        result = registers.rax
        if stop.reason is vmexit.StopReason.UNTIL:
            registers.update(**before)
        return stop, result
