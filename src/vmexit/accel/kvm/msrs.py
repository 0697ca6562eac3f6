"""MSRs of a vCPU: KVM_GET_MSRS and KVM_SET_MSRS (KVM API 4.18, 4.19), which end at the first that
they refuse.
"""

import struct
from collections.abc import Iterable, Mapping
from fcntl import ioctl

from vmexit.abi.kvm import KVM_GET_MSRS, KVM_SET_MSRS
from vmexit.core.steps import Steps

_HEAD = struct.Struct("=II")  # struct kvm_msrs: how many, padding
_ENTRY = struct.Struct("=IIQ")  # struct kvm_msr_entry: index, reserved, value

ENTRY_SIZE = _ENTRY.size
_MOST = 200  # at once; KVM takes 255
_SOME = 8 * ENTRY_SIZE  # bytes that are compared at once: most are alike


def pack(values: Mapping[int, int]) -> bytes:
    """A `struct kvm_msr_entry` for each."""
    return b"".join(_ENTRY.pack(index, 0, value) for index, value in values.items())


def unpack(entries: bytes | bytearray) -> dict[int, int]:
    """The values in such structures, by index."""
    return {index: value for index, _, value in _ENTRY.iter_unpack(entries)}


def request(entries: bytes) -> bytearray:
    """A `struct kvm_msrs` with these, for either ioctl."""
    return bytearray(_HEAD.pack(len(entries) // ENTRY_SIZE, 0) + entries)


def answer(buffer: bytearray) -> dict[int, int]:
    """What such a structure holds."""
    return unpack(buffer[_HEAD.size :])


def get(vcpu: int, indices: Iterable[int]) -> dict[int, int]:
    """Those that KVM can read of the vCPU with this descriptor."""
    todo, values = list(indices), dict[int, int]()
    while todo:
        now = todo[:_MOST]
        found, done = _ask(vcpu, pack(dict.fromkeys(now, 0)))
        values |= unpack(found[: done * ENTRY_SIZE])
        todo = todo[done + (done < len(now)) :]  # behind the one that it cannot
    return values


def put(vcpu: int, values: Mapping[int, int]) -> list[int]:
    """Set them. Returns those that KVM has refused."""
    todo, refused = list(values.items()), []
    while todo:
        now = todo[:_MOST]
        done = ioctl(vcpu, KVM_SET_MSRS, request(pack(dict(now))), True)
        refused += [index for index, _ in now[done : done + 1]]
        todo = todo[done + (done < len(now)) :]
    return refused


class Wanted:
    """Values that MSRs are to have, again and again."""

    def __init__(self, entries: bytes) -> None:
        """A `struct kvm_msr_entry` for each."""
        most = _MOST * ENTRY_SIZE
        parts = [entries[at : at + most] for at in range(0, len(entries), most)]
        self._parts = [(part, request(part), bytes(request(part))) for part in parts]

    def twin(self) -> "Wanted":
        """The same for another vCPU, at the same time."""
        twin = Wanted.__new__(Wanted)
        twin._parts = [(part, bytearray(wanted), wanted) for part, _, wanted in self._parts]
        return twin

    def unlike(self, vcpu: int) -> dict[int, int]:
        """Those that have another value now, or none: as they are here."""
        values = dict[int, int]()
        for entries, buffer, wanted in self._parts:
            done = ioctl(vcpu, KVM_GET_MSRS, buffer, True)  # which leaves the indices in it
            if done * ENTRY_SIZE < len(entries):
                values |= _unlike(entries, get(vcpu, unpack(entries)))
            else:
                values |= _differing(entries, buffer, wanted)
        return values

    def unlike_in(self, has: Mapping[int, int]) -> dict[int, int]:
        """The same for a vCPU that has these values."""
        values = dict[int, int]()
        for entries, _, _ in self._parts:
            values |= _unlike(entries, has)
        return values

    def ask(self, steps: Steps, vcpu: int) -> None:
        """Add the steps that ask for them; they fail where one of them does not exist."""
        for entries, buffer, _ in self._parts:
            steps.call(vcpu, KVM_GET_MSRS, buffer, len(entries) // ENTRY_SIZE)

    def compare(self, steps: Steps) -> None:
        """Add steps that fail if what came is not as it is here."""
        for _, buffer, wanted in self._parts:
            steps.compare(buffer, wanted)

    def differing(self) -> dict[int, int]:
        """As `unlike()`, once those steps went well."""
        values = dict[int, int]()
        for entries, buffer, wanted in self._parts:
            values |= _differing(entries, buffer, wanted)
        return values


def _unlike(entries: bytes, has: Mapping[int, int]) -> dict[int, int]:
    return {index: value for index, value in unpack(entries).items() if has.get(index) != value}


def _differing(entries: bytes, buffer: bytearray, wanted: bytes) -> dict[int, int]:
    """Those of `entries` that have another value in `buffer`, which would be `wanted`."""
    values = dict[int, int]()
    if buffer == wanted:
        return values
    found = buffer[_HEAD.size :]
    for at in range(0, len(entries), _SOME):
        if entries[at : at + _SOME] != found[at : at + _SOME]:
            values |= _unlike(entries[at : at + _SOME], unpack(found[at : at + _SOME]))
    return values


def _ask(vcpu: int, entries: bytes) -> tuple[bytes, int]:
    """`entries` with the values of so many of them."""
    buffer = request(entries)
    done = ioctl(vcpu, KVM_GET_MSRS, buffer, True)
    return bytes(buffer[_HEAD.size :]), done
