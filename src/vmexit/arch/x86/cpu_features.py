"""Names of CPUID features, as Linux and QEMU use them, and the bits that they stand for."""

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
        lahf_lm - svm - - abm sse4a misalignsse 3dnowprefetch - - xop - - - fma4 - - - - - tbm -
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
