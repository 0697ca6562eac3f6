#!/usr/bin/env python3
"""Fuzz a guest: snapshot it where it reads its input, then run it with input after input.

Coverage is by breakpoints: one at each basic block, removed once hit. An input that comes to
a block where none was before is kept, and mutated in its turn.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import capstone
from elftools.elf.elffile import ELFFile

from vmexit import Machine, Point, Stop, StopReason

SOURCE = Path(__file__).with_name("fuzz-target.c")
LOADED_AT = 0x1000
DONE_PORT = 0x10
LONGEST = 64  # bytes of an input
FLAGS = (
    "-O1 -Wall -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none -mno-red-zone "
    "-mgeneral-regs-only -fno-asynchronous-unwind-tables -nostdlib -static -Wl,--build-id=none "
    f"-Wl,-Ttext={LOADED_AT:#x} -Wl,-z,noseparate-code -Wl,-e,start"
).split()


class Target(NamedTuple):
    """What is fuzzed: a flat image, the same with symbols, and what is known of its code."""

    image: Path
    elf: Path
    entry: int
    blocks: frozenset[int]
    """Addresses where basic blocks begin."""
    constants: bytes
    """What its code compares bytes with: good bytes for an input."""


def build(folder: Path) -> Target:
    """Compile the target; gcc and binutils are all that it takes."""
    elf, image = folder / "target.elf", folder / "target.bin"
    subprocess.run(["gcc", *FLAGS, "-o", elf, SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", elf, image], check=True)
    return Target(image, elf, *look_at_code(elf))


def look_at_code(path: Path) -> tuple[int, frozenset[int], bytes]:
    """Where it starts, where basic blocks begin, and bytes that something is compared with."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        section = elf.get_section_by_name(".text")
        code, base, entry = section.data(), section["sh_addr"], elf["e_entry"]
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    blocks, constants = set(), set()
    for instruction in decoder.disasm(code, base):
        immediates = [o.imm for o in instruction.operands if o.type == capstone.x86.X86_OP_IMM]
        if instruction.group(capstone.CS_GRP_JUMP) or instruction.group(capstone.CS_GRP_CALL):
            blocks.update(immediates)
            blocks.add(instruction.address + instruction.size)
        elif instruction.mnemonic == "cmp":
            constants.update(immediate & 0xFF for immediate in immediates)
    inside = frozenset(block for block in blocks if base <= block < base + len(code))
    return entry, inside, bytes(sorted(constants))


class Mutator:
    """Inputs from inputs. The same seed gives the same ones."""

    def __init__(self, seed: int, constants: bytes) -> None:
        self._random = random.Random(seed)
        self._constants = constants or b"\0"

    def mutate(self, corpus: list[bytes]) -> bytes:
        """One of the corpus, with a few changes."""
        pick = self._random
        # Half of the time the newest: that is where there is something to find.
        data = bytearray(corpus[-1] if pick.random() < 0.5 else pick.choice(corpus))
        for _ in range(pick.choice((1, 1, 2, 4))):
            self._change(data, corpus)
        return bytes(data[:LONGEST])

    def _change(self, data: bytearray, corpus: list[bytes]) -> None:
        pick = self._random
        at = pick.randrange(len(data) + 1)
        match pick.randrange(6):
            case 0:
                data[at : at + 1] = bytes([pick.randrange(256)])
            case 1 | 2:
                data[at : at + 1] = bytes([pick.choice(self._constants)])
            case 3:
                data[at:at] = bytes([pick.choice(self._constants)])
            case 4:
                del data[at : at + pick.randrange(1, 4)]
            case 5:
                data[at:] = pick.choice(corpus)[at:]


class Fuzzer:
    """A machine with the target, which goes back to where its input is read for each input."""

    def __init__(self, target: Target, accel: str, timeout: float) -> None:
        self._vm = vm = Machine(
            "2M", accel, image=target.image, load_address=LOADED_AT, entry=target.entry,
            mode="long", symbols=target.elf,
        )  # fmt: skip
        self._timeout = timeout
        self._left = set(target.blocks)
        vm.on_pio(DONE_PORT, write=lambda access: vm.stop())
        # parse(data, size) is about to begin: the arguments are in RDI and RSI.
        stop = vm.run_until(symbol="parse", timeout=30)
        assert stop.reason is StopReason.UNTIL, stop.summary()
        self._input = vm.vcpus[0].regs.rdi
        self._snapshot = vm.snapshot()
        for block in target.blocks:
            vm.add_breakpoint(Point(block))

    def execute(self, data: bytes) -> tuple[Stop, int, set[int]]:
        """How the target ends with this input, where, and which blocks it was the first in."""
        vm, regs = self._vm, self._vm.vcpus[0].regs
        vm.reset_to(self._snapshot)
        vm.memory.write(self._input, data)
        regs.rsi = len(data)
        new = set()
        while True:
            stop = vm.run(self._timeout)
            if stop.reason is not StopReason.DEBUG or stop.point is None:
                return stop, regs.rip, new
            new.add(stop.point.gva)
            self._left.discard(stop.point.gva)
            vm.remove_breakpoint(stop.point)

    def close(self) -> None:
        """Free the machine."""
        self._vm.close()
        self._snapshot.close()


def is_crash(stop: Stop) -> bool:
    """A triple fault and the like, or no end."""
    return stop.crashed or stop.reason is StopReason.TIMEOUT


def name_of(stop: Stop, rip: int, data: bytes) -> str:
    """The name of the file for an input that crashes."""
    return f"{stop.reason.value}-{rip:x}-{hashlib.sha256(data).hexdigest()[:8]}"


class Progress(NamedTuple):
    """So far."""

    executions: int
    covered: int
    corpus: int
    crashes: int
    new: Path | None = None
    """A crash that was saved just now."""


def fuzz(
    fuzzer: Fuzzer, mutator: Mutator, crashes: Path, executions: int, *, blind: bool
) -> Iterator[Progress]:
    """Run so many inputs. One file for each place and kind of a crash."""
    corpus = [b"\0" * 16]
    covered = set(fuzzer.execute(corpus[0])[2])
    seen: set[tuple[StopReason, int]] = set()
    for count in range(1, executions + 1):
        data = mutator.mutate(corpus)
        stop, rip, new = fuzzer.execute(data)
        covered |= new
        saved = None
        if is_crash(stop):
            # Where a loop without end is stopped is a matter of chance.
            where = stop.reason, 0 if stop.reason is StopReason.TIMEOUT else rip
            if where not in seen:
                seen.add(where)
                crashes.mkdir(parents=True, exist_ok=True)
                saved = crashes / name_of(stop, rip, data)
                saved.write_bytes(data)
        elif new and not blind:
            corpus.append(data)
        yield Progress(count, len(covered), len(corpus), len(seen), saved)


def main() -> int:
    """Fuzz, or replay an input that was saved: the status is 1 then if it crashes once more."""
    parser = argparse.ArgumentParser(description="Fuzz the parser in fuzz-target.c.")
    parser.add_argument("--accel", choices=("auto", "kvm", "soft"), default="soft")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--executions", type=int, default=20_000, metavar="N")
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), metavar="DIR")
    parser.add_argument("--timeout", type=float, default=1, metavar="SECONDS", help="of an input")
    parser.add_argument("--blind", action="store_true", help="keep no input for its coverage")
    parser.add_argument("--until", choices=("shutdown", "timeout"), help="end at such a crash")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this input, and tell")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = build(Path(folder))
        fuzzer = Fuzzer(target, arguments.accel, arguments.timeout)
        try:
            if arguments.replay is not None:
                stop, rip, _ = fuzzer.execute(arguments.replay.read_bytes())
                print(f"{stop.summary()} at {rip:#x}", stop.dump, sep="\n")
                return int(is_crash(stop))
            mutator = Mutator(arguments.seed, target.constants)
            began = shown = time.monotonic()
            for progress in fuzz(
                fuzzer, mutator, arguments.crashes, arguments.executions, blind=arguments.blind
            ):
                now = time.monotonic()
                last = progress.executions == arguments.executions
                if progress.new is not None:
                    print(f"crash: {progress.new}")
                    last |= progress.new.name.partition("-")[0] == arguments.until
                if last or now - shown >= 1:
                    shown = now
                    print(
                        f"{progress.executions} executions, "
                        f"{progress.executions / (now - began):.0f}/s, "
                        f"{progress.covered} of {len(target.blocks)} blocks, "
                        f"{progress.corpus} inputs, {progress.crashes} crashes",
                        flush=True,
                    )
                if last:
                    return 0
        except KeyboardInterrupt:
            return 130
        finally:
            fuzzer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
