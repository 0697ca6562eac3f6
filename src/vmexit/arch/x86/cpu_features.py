"""Names of CPUID features, as Linux and QEMU use them, and the bits that they stand for."""

from collections.abc import Iterable
from typing import NamedTuple

from vmexit.arch.x86.cpuid import Leaf, Table

# Leaf, sub-leaf and register (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E): the names of
# bits from 0 on. `-` has no name, or no meaning that a user could choose.
_WORDS: dict[tuple[int, int | None, str], str] = {
    (1, None, "edx"): """
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov
        pat pse36 - clflush - - - mmx fxsr sse sse2 - ht""",
    (1, None, "ecx"): """
        sse3 pclmulqdq dtes64 monitor - vmx - - - ssse3 - - fma cx16 - pdcm
        - pcid - sse4_1 sse4_2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand
        hypervisor""",
    (7, 0, "ebx"): """
        fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm - - mpx -
        avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb - - - avx512cd sha avx512bw
        avx512vl""",
    (7, 0, "ecx"): """
        - avx512vbmi umip pku ospke waitpkg avx512_vbmi2 - gfni vaes vpclmulqdq avx512_vnni
        avx512_bitalg - avx512_vpopcntdq - la57 - - - - - rdpid - - cldemote - movdiri movdir64b""",
    (7, 0, "edx"): """
        - - - - fsrm - - - avx512_vp2intersect - md_clear - - - serialize - - - - - - - amx-bf16
        avx512_fp16 amx-tile amx-int8 spec-ctrl stibp - arch-capabilities - ssbd""",
    (7, 1, "eax"): "- - - - avx-vnni avx512_bf16 - - - - fzrm fsrs fsrc",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves",
    (0x8000_0001, None, "edx"): """
        - - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm
        3dnowext 3dnow""",
    (0x8000_0001, None, "ecx"): """
        lahf_lm - svm - - abm sse4a misalignsse 3dnowprefetch - - xop - - - - fma4 - - - - tbm -
        perfctr_core""",
    (0x8000_0007, None, "edx"): "- - - - - - - - invtsc",
    (0x8000_0008, None, "ebx"): "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs",
    (0x4000_0001, None, "eax"): """
        kvmclock kvm-nopiodelay kvm-mmu kvmclock2 kvm-asyncpf kvm-steal-time kvm-pv-eoi
        kvm-pv-unhalt - kvm-pv-tlb-flush - kvm-pv-ipi kvm-poll-control""",
}
_ALIASES = {
    "pni": "sse3", "cmpxchg16b": "cx16", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "lzcnt": "abm",
    "tsc_deadline_timer": "tsc-deadline", "tsc_deadline": "tsc-deadline", "htt": "ht",
}  # fmt: skip

# What is nothing without another feature (Intel SDM vol. 1, 13.3, 14.3 and 15.2 to 15.4; AMD APM
# vol. 3, appendix D): the other → those that go with it.
_CARRIES = {
    "fxsr": "fxsr_opt sse xsave", "mmx": "mmxext 3dnow", "3dnow": "3dnowext",
    "sse": "sse2 misalignsse",
    "sse2": "sse3 sse4a ssse3 aes pclmulqdq sha gfni",
    "sse3": "sse4_1", "ssse3": "sse4_1", "sse4_1": "sse4_2",
    "xsave": "xsaveopt xsavec xgetbv1 xsaves xsaveerptr avx mpx pku amx-tile",
    "pku": "ospke", "amx-tile": "amx-bf16 amx-int8",
    "avx": "avx2 f16c fma fma4 xop vaes vpclmulqdq", "avx2": "avx-vnni avx512f",
    "avx512f":
        "avx512dq avx512ifma avx512cd avx512bw avx512vl avx512vbmi avx512_vnni avx512_vpopcntdq "
        "avx512_vp2intersect avx512_bf16",
    "avx512bw": "avx512vbmi avx512_vbmi2 avx512_bitalg avx512_fp16",
    "apic": "x2apic tsc-deadline", "tsc": "rdtscp tsc-deadline tsc_adjust invtsc",
    "spec-ctrl": "ssbd",
}  # fmt: skip

# Leaf 0xd: which components of the state XSAVE keeps for a feature (Intel SDM vol. 1, 13.1).
_XSAVE_LEAF, _XSAVE_HEADER_END = 0xD, 576
_COMPONENTS = {
    "avx": 1 << 2, "mpx": 3 << 3, "avx512f": 7 << 5, "pku": 1 << 9, "amx-tile": 3 << 17,
}  # fmt: skip
_ALL_COMPONENTS = (1 << 64) - 1

# AMD repeats these bits of leaf 1, EDX in leaf 0x80000001 (APM vol. 3, E.4.2); Intel has 0 there.
_REPEATED = 0x0183_F3FF


class Feature(NamedTuple):
    """A bit of CPUID."""

    leaf: int
    subleaf: int | None
    register: str
    bit: int

    def is_in(self, table: Table) -> bool:
        """Whether `table` offers it."""
        leaf = table.get((self.leaf, self.subleaf), Leaf())
        return bool(getattr(leaf, self.register) >> self.bit & 1)

    def put_into(self, table: Table, offered: bool) -> None:
        """Have `table` offer it, or not."""
        key = self.leaf, self.subleaf
        leaf = table.get(key, Leaf())
        word = getattr(leaf, self.register) & ~(1 << self.bit) | offered << self.bit
        if key in table or offered:
            table[key] = leaf._replace(**{self.register: word})


FEATURES = {
    name: Feature(leaf, subleaf, register, bit)
    for (leaf, subleaf, register), names in _WORDS.items()
    for bit, name in enumerate(names.split())
    if name != "-"
}


def canonical(name: str) -> str:
    """The one name of a feature that may have several; empty for one that is not known."""
    name = _ALIASES.get(name, name)
    return name if name in FEATURES else ""


def offered(table: Table) -> list[str]:
    """The names of the features in `table`."""
    return [name for name, feature in FEATURES.items() if feature.is_in(table)]


def with_dependents(names: Iterable[str]) -> tuple[str, ...]:
    """`names` and all that is nothing without them, each once."""
    found: dict[str, None] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = None
            todo += _CARRIES.get(name, "").split()
    return tuple(found)


def without(table: Table, names: Iterable[str]) -> Table:
    """`table`, or a part of one, without these features, their dependents and their state."""
    new = dict(table)
    left_out = with_dependents(names)
    for name in left_out:
        FEATURES[name].put_into(new, False)
        _forget_repeated(new, FEATURES[name])
    _forget_state(new, left_out)
    return new


def _forget_repeated(table: Table, feature: Feature) -> None:
    key = 0x8000_0001, None
    if feature[:3] == (1, None, "edx") and 1 << feature.bit & _REPEATED and key in table:
        table[key] = table[key]._replace(edx=table[key].edx & ~(1 << feature.bit))


def _forget_state(table: Table, left_out: Iterable[str]) -> None:
    """Take what XSAVE would keep for features out of leaf 0xd (Intel SDM vol. 2, CPUID)."""
    gone = 0
    for name in left_out:
        gone |= _ALL_COMPONENTS if name == "xsave" else _COMPONENTS.get(name, 0)
    supervisor = "xsaves" in left_out
    if not gone and not supervisor:
        return
    size = _XSAVE_HEADER_END
    for key, leaf in table.items():
        number, subleaf = key
        if number != _XSAVE_LEAF or subleaf is None or subleaf < 2:
            continue
        if gone >> subleaf & 1 or (supervisor and leaf.ecx & 1):
            table[key] = Leaf()
        elif not leaf.ecx & 1:  # a component of user space, at offset EBX
            size = max(size, leaf.ebx + leaf.eax)
    if (first := table.get((_XSAVE_LEAF, 0))) is not None:
        kept = (first.edx << 32 | first.eax) & ~gone
        # EBX is the size of what is in use, which is the least at the start.
        table[_XSAVE_LEAF, 0] = (
            Leaf(kept & 0xFFFF_FFFF, _XSAVE_HEADER_END, size, kept >> 32) if kept else Leaf()
        )
    if supervisor and (second := table.get((_XSAVE_LEAF, 1))) is not None:
        table[_XSAVE_LEAF, 1] = Leaf(second.eax)
