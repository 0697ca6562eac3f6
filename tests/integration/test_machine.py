"""The library: a machine that a Python program holds, on each accelerator."""

import threading
from io import StringIO

import pytest

import vmexit
from vmexit import (
    Access,
    ConfigError,
    ExitStats,
    GuestAddressError,
    GuestCrash,
    HostError,
    ImageError,
    JsonTrace,
    Machine,
    Stop,
    StopReason,
    VmexitError,
)
from vmexit.abi import virtio as v

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

ENDLESS = b"\xeb\xfe"
HALT = b"\xf4"


def test_the_example_of_the_documentation(accel):
    with vmexit.Machine(memory="128M", accel=accel) as vm:
        vm.load_bytes(b"\xb0\x2a\xe6\x10\xf4", at=0x1000)  # mov al, 42; out 0x10, al; hlt
        seen = []
        vm.on_pio(0x10, write=lambda access: seen.append(access.value))
        stop = vm.run(timeout=60)
        assert seen == [42]
        assert stop == Stop(StopReason.HALT, vcpu=0)
        assert vm.vcpus[0].regs.rax == 42
        assert vm.accel == accel


def test_run_goes_on_behind_the_halt(machine):
    machine.load_bytes(b"\xf4\xb0\x01\xf4\xb0\x02\xf4")
    regs = machine.vcpus[0].regs
    for expected in (0, 1, 2):
        assert machine.run(timeout=60).reason is StopReason.HALT
        assert regs.rax == expected


def test_registers_are_read_and_written_by_name(machine):
    machine.load_bytes(b"\x01\xd8\xf4")  # add ax, bx; hlt
    regs = machine.vcpus[0].regs
    regs.rax, regs.rbx, regs.r15 = 0x1234, 0x1111, -1
    machine.run(timeout=60)
    assert (regs.rax, regs.r15) == (0x2345, 2**64 - 1)
    assert regs.rflags == 0x2 | 0  # no flag is set by that sum
    regs.cs = regs.cs._replace(base=0x2000, selector=0x200)
    regs.rip = 0
    machine.memory.write(0x2000, b"\xb8\x77\x77\xf4")
    machine.run(timeout=60)
    assert regs.rax == 0x7777
    assert regs.as_dict()["rax"] == 0x7777
    assert set(regs.as_dict()) == set(dir(regs))


def test_a_register_that_is_none_and_a_value_that_is_none(machine):
    regs = machine.vcpus[0].regs
    for name in ("eax", "foo"):
        with pytest.raises(AttributeError, match=f"no register '{name}'"):
            getattr(regs, name)
        with pytest.raises(AttributeError, match=f"no register '{name}'"):
            setattr(regs, name, 1)
    with pytest.raises(TypeError, match="cs takes a Segment, not 8"):
        regs.cs = 8
    with pytest.raises(TypeError, match="rax takes a number, not 'a'"):
        regs.rax = "a"
    with pytest.raises(ValueError, match="rax has 64 bits"):
        regs.rax = 1 << 64
    with pytest.raises(ValueError, match="limit has 32 bits"):
        regs.cs = regs.cs._replace(limit=1 << 40)
    with pytest.raises(ValueError, match="gdt: limit has 16 bits"):
        regs.gdt = regs.gdt._replace(limit=1 << 16)
    with pytest.raises(ConfigError, match="timeout"):
        machine.run(timeout=-1)
    assert "rip=" in repr(regs)


def test_registers_that_belong_together_are_written_at_once(accel):
    with Machine("2M", accel, mode="long") as vm:
        vm.load_bytes(b"\xb8\x01\x00\xf4")  # mov ax, 1; hlt - as 16-bit code
        regs = vm.vcpus[0].regs
        real = regs.cs._replace(selector=0x100, base=0x1000, limit=0xFFFF, l=0, db=0, g=0)
        regs.update(cr0=0x10, cr4=0, efer=0, cs=real, rip=0, rax=0)
        assert vm.run(timeout=20).reason is StopReason.HALT
        assert (regs.rax, regs.cr0 & 1) == (1, 0)


def test_cr8_is_what_was_written(accel):
    if accel == "soft":
        pytest.skip("the software CPU has no LAPIC, and so no CR8")
    with Machine("2M", accel, mode="long") as vm:
        vm.load_bytes(b"\x44\x0f\x20\xc0\xf4")  # mov rax, cr8; hlt
        vm.vcpus[0].regs.cr8 = 5
        assert vm.run(timeout=60).reason is StopReason.HALT
        assert (vm.vcpus[0].regs.rax, vm.vcpus[0].regs.cr8) == (5, 5)


@pytest.mark.parametrize(
    ("mode", "code"), [("long", b"\x0f\x05\xb0\x07\xe6\xf4"), ("protected", b"\x0f\x34\xf4")]
)
def test_system_calls_that_lead_nowhere_are_a_crash(accel, mode, code):
    with Machine("2M", accel, mode=mode) as vm:
        vm.load_bytes(code)
        stop = vm.run(timeout=60)
        assert stop.crashed
        assert accel == "kvm" or vm.vcpus[0].regs.rip == 0x1000


def test_a_device_that_fails_in_the_middle_of_an_access_gets_no_more_of_it(accel):
    """A store across two pages: its two halves are two exits on KVM."""
    seen: list[Access] = []

    def fail(access: Access) -> None:
        seen.append(access)
        raise ZeroDivisionError

    with Machine("1M", accel, mode="protected") as vm:
        vm.load_bytes(bytes.fromhex("a3fe0f0020f4"))  # mov [0x20000ffe], eax; hlt
        vm.on_mmio(0x2000_0000, 0x2000, write=fail)
        with pytest.raises(ZeroDivisionError):
            vm.run(timeout=60)
        if accel == "kvm":
            assert [a.size for a in seen] == [2]
            assert vm.vcpus[0].regs.rip == 0x1005
            assert vm.run(timeout=60).reason is StopReason.HALT


def test_a_machine_can_be_described_and_its_configuration_copied(machine):
    import copy
    import pickle

    config = machine.config
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    with pytest.raises(ConfigError, match="memory takes a number"):
        vmexit.MachineConfig(memory="128M")
    with pytest.raises(ConfigError, match="debugcon takes"):
        Machine("1M", debugcon=0x402)
    with pytest.raises(AttributeError):
        _ = copy.copy(machine.vcpus[0].regs).rax


def test_within_an_access_only_general_registers_are_written(machine):
    machine.load_bytes(b"\xe6\x10\xe6\x11\xf4")
    regs = machine.vcpus[0].regs
    refused = []

    def write(access: Access) -> None:
        regs.rbx = 0x77
        for name, value in (("rip", 0), ("rflags", 2), ("cr3", 0)):
            try:
                setattr(regs, name, value)
            except VmexitError as error:
                refused.append(str(error))

    def read(access: Access) -> int:
        with pytest.raises(VmexitError, match="rbx cannot be written"):
            regs.rbx = 1
        return 0x42

    machine.on_pio(0x10, write=write, read=read)
    machine.load_bytes(b"\xe6\x10\xe4\x10\xf4")
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert (regs.rbx, regs.rax) == (0x77, 0x42)
    assert [text.partition(" ")[0] for text in refused] == ["rip", "rflags", "cr3"]


def test_where_the_machine_was_told_to_start_the_first_image_starts(accel):
    with Machine("1M", accel, entry=0x9001) as vm:
        vm.load_bytes(b"\xf4\xb0\x07\xf4", at=0x9000)
        vm.run(timeout=60)
        assert vm.vcpus[0].regs.rax == 7
        with pytest.raises(ImageError, match="nothing to load"):
            vm.load_bytes(b"")
    assert repr(vm) == f"<Machine on {accel}, 1 MiB, closed>"


def test_port_reads_are_answered_and_cut_to_their_size(machine):
    machine.load_bytes(b"\xe5\x20\x66\xe7\x24\xe4\x20\xf4")  # in ax,0x20; out 0x24,eax; in al,0x20
    seen: list[Access] = []

    def answer(access: Access) -> int:
        seen.append(access)
        return 0x1_2345_6789

    machine.on_pio(0x20, read=answer)
    machine.on_pio(0x24, write=seen.append)
    machine.run(timeout=60)
    assert seen == [
        Access(0x20, 2, 0, False),
        Access(0x24, 4, 0x6789, True),
        Access(0x20, 1, 0, False),
    ]
    assert machine.vcpus[0].regs.rax == 0x6789


def test_mmio_in_long_mode(accel):
    code = bytes.fromhex(
        "48bb0000000001000000"  # mov rbx, 0x1_0000_0000 - it is mapped up to there only; see below
        "bb000000d0"  # mov ebx, 0xd0000000
        "488b03"  # mov rax, [rbx]
        "c7430878563412"  # mov dword [rbx + 8], 0x12345678
        "f4"
    )
    seen: list[Access] = []
    with Machine("2M", accel, mode="long") as vm:
        vm.load_bytes(code)
        vm.on_mmio(
            0xD000_0000, 16, read=lambda a: 0x1122_3344_5566_7788 + a.size, write=seen.append
        )
        assert vm.run(timeout=60).reason is StopReason.HALT
        assert vm.vcpus[0].regs.rax == 0x1122_3344_5566_7790
    assert seen == [Access(0xD000_0008, 4, 0x12345678, True)]


def test_what_nobody_answers_reads_all_ones_and_is_counted(machine):
    machine.load_bytes(b"\x66\xe5\x20\xe6\x20\xf4")
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 0xFFFF_FFFF
    assert machine.unclaimed == 2


def test_an_exception_of_an_mmio_callback_ends_the_run_at_once(accel):
    def fail(access: Access) -> int:
        raise ZeroDivisionError("on purpose")

    seen = []
    with Machine("1M", accel, mode="protected") as vm:
        # mov [mmio], eax; mov eax, [mmio]; out 0x10, al; hlt
        vm.load_bytes(bytes.fromhex("a300000020a100000020e610f4"))
        vm.on_mmio(0x2000_0000, 4, read=fail, write=fail)
        vm.on_pio(0x10, write=seen.append)
        for rip in (0x1005, 0x100A):
            with pytest.raises(ZeroDivisionError):
                vm.run(timeout=60)
            assert seen == []
            assert vm.vcpus[0].regs.rip == rip
        assert vm.run(timeout=60).reason is StopReason.HALT
    assert len(seen) == 1


def test_an_exception_of_a_callback_comes_out_of_run_and_the_machine_goes_on(machine):
    machine.load_bytes(b"\xe6\x10\xb0\x01\xe6\x11\xf4")

    def fail(access: Access) -> None:
        raise ZeroDivisionError("on purpose")

    seen = []
    machine.on_pio(0x10, write=fail)
    machine.on_pio(0x11, write=seen.append)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        machine.run(timeout=60)
    assert seen == []
    assert machine.vcpus[0].regs.rip == 2
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert [a.value for a in seen] == [1]


@pytest.mark.parametrize("code", [b"\xe4\x10\xf4", b"\xec\xf4", b"\xe6\x10\xf4", b"\xee\xf4"])
def test_an_access_whose_callback_fails_is_complete(machine, code):
    """in al, 0x10; in al, dx; out 0x10, al; out dx, al - the HLT behind it is not run yet."""

    def fail(access: Access) -> int:
        raise ZeroDivisionError

    machine.load_bytes(code)
    machine.vcpus[0].regs.rdx = 0x10
    machine.on_pio(0x10, read=fail, write=fail)
    with pytest.raises(ZeroDivisionError):
        machine.run(timeout=60)
    assert machine.vcpus[0].regs.rip == len(code) - 1
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert machine.vcpus[0].regs.rip == len(code)


def test_functions_that_are_none_and_answers_that_are_none(machine):
    with pytest.raises(TypeError, match="write takes a function, not 5"):
        machine.on_pio(0x10, write=5)
    machine.load_bytes(b"\xe4\x10\xf4")
    machine.on_pio(0x10, read=lambda access: None)
    with pytest.raises(TypeError, match="read function of 0x10 returned None"):
        machine.run(timeout=60)


def test_an_os_error_of_a_callback_is_not_taken_for_kvms(machine):
    machine.load_bytes(b"\xe4\x10\xf4")

    def fail(access: Access) -> int:
        raise InterruptedError("of the callback")

    machine.on_pio(0x10, read=fail)
    with pytest.raises(InterruptedError, match="of the callback"):
        machine.run(timeout=60)


def test_a_crash_has_registers_and_check_raises_it(accel):
    with Machine("1M", accel, mode="protected") as vm:
        vm.load_bytes(b"\xb8\x78\x56\x34\x12\x0f\x0b")  # mov eax, 0x12345678; ud2
        stop = vm.run(timeout=60)
    assert stop.crashed
    with pytest.raises(GuestCrash, match=r"(?s)shutdown.*rax="):
        stop.check()
    if "reset the vCPU" not in stop.detail:  # as AMD's KVM does
        assert "rax=0000000012345678" in stop.dump
        assert "`ud2`" in stop.dump
    assert Stop(StopReason.HALT).check().status == 0


def test_code_that_the_host_changes_is_seen(machine):
    machine.load_bytes(b"\xb0\x01\xf4")
    machine.run(timeout=60)
    machine.memory.write(0x1000, b"\xb0\x02\xf4")
    machine.vcpus[0].regs.rip = 0
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 2


def call_twice(machine):
    """mov dx, ax; out 0x10, ax around two calls of code in another page, which returns 1 in AX."""
    machine.load_bytes(b"\xe8\xfd\x0f\xe7\x10\xe8\xf8\x0f\xe7\x10\xf4".ljust(64, b"\x90"))
    machine.vcpus[0].regs.rsp = 0x8000
    machine.memory.write(0x2000, b"\xb8\x01\x00\xc3")  # mov ax, 1; ret


@pytest.mark.parametrize("how", ["write", "slice", "view", "thread"])
def test_code_that_a_callback_changes_is_seen_in_the_same_run(machine, how):
    """The second call executes what the callback of the first answer has put there."""
    call_twice(machine)
    seen = []

    def change(access: Access) -> None:
        seen.append(access.value)
        memory, new = machine.memory, b"\x02"
        if how == "write":
            memory.write(0x2001, new)
        elif how == "slice":
            memory[0x2001:0x2002] = new
        elif how == "view":
            memory.view(0x2001, 1)[:] = new
            memory.host_wrote([(0x2001, 1)], 1)
        else:
            thread = threading.Thread(target=lambda: memory.write(0x2001, new))
            thread.start()
            thread.join()

    machine.on_pio(0x10, write=change)
    assert machine.run(timeout=60).reason is StopReason.HALT
    assert seen == [1, 2]


def test_code_that_the_guest_changes_is_seen(machine):
    # mov byte [l + 1], 9 (DS is 0, so at 0x1007); jmp l; l: mov al, 1; hlt
    machine.load_bytes(bytes.fromhex("c606081009eb00b001f4"))
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 9


def test_guest_memory_is_shared_both_ways_without_copies(machine):
    window = machine.memory[0x5000:0x5008]
    machine.load_bytes(b"\xa1\x00\x50\xa3\x04\x50\xf4")  # mov ax, [0x5000]; mov [0x5004], ax
    window[:2] = b"\xcd\xab"
    machine.run(timeout=60)
    assert bytes(window[4:6]) == b"\xcd\xab"
    assert machine.memory.hva(0x5000) != 0
    window.release()


def test_translate_follows_the_guests_page_tables(accel):
    with Machine("4M", accel, mode="long") as vm:
        vm.load_bytes(HALT)
        assert vm.translate(0x1234) == 0x1234  # the identity map that the guest starts with
        assert vm.translate(0xFFFF_F000) == 0xFFFF_F000
        assert vm.translate(5 << 30) is None
        # A table of our own: 0x7fff_0000_0000 → 0x200000.
        memory = vm.memory
        memory.write_u64(0x10000 + 8 * 0xFF, 0x11003)
        memory.write_u64(0x11000 + 8 * 0x1FC, 0x12003)
        memory.write_u64(0x12000, 0x200083)
        vm.vcpus[0].regs.cr3 = 0x10000
        assert vm.translate(0x7FFF_0000_0123) == 0x200123
        assert vm.translate(0x1234) is None
    with Machine("1M", accel) as vm:
        assert vm.translate(0xABCDE) == 0xABCDE  # no paging: the same


def test_load_reads_a_file_and_starts_there(machine, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"\xb0\x33\xf4")
    machine.load(image, at=0x7C00)
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 0x33
    with pytest.raises(ImageError, match="check the path"):
        machine.load(tmp_path / "nothing")


def test_the_first_image_loaded_is_the_one_that_starts(machine):
    machine.load_bytes(b"\xb0\x01\xf4", at=0x2000)
    machine.load_bytes(b"\xb0\x02\xf4", at=0x3000)
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 1
    machine.load_bytes(b"\xb0\x03\xf4", at=0x4000, entry=0x4000)
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 3
    machine.load_bytes(b"\xb8\x04\x00\x00\x00\xf4", at=0x5000, mode="protected")
    machine.run(timeout=60)
    assert machine.vcpus[0].regs.rax == 4
    assert machine.vcpus[0].regs.cr0 & 1


def test_bad_arguments(machine):
    with pytest.raises(ConfigError, match="overlaps"):
        machine.on_pio(0xF4)  # the debug-exit port
    with pytest.raises(ConfigError, match="not within 0 to 0xffff"):
        machine.on_pio(0x10000)
    with pytest.raises(ConfigError, match="lies in RAM"):
        machine.on_mmio(0xF_F000, 0x1000)
    with pytest.raises(ImageError, match="does not fit into memory"):
        machine.load_bytes(bytes(0x1001), at=0xF_F000)
    with pytest.raises(ConfigError, match="no CPU mode 'unreal'"):
        machine.load_bytes(HALT, mode="unreal")
    with pytest.raises(GuestAddressError):
        machine.memory.read_u32(0xF_FFFE)


def test_observers_see_each_exit(accel):
    stats, trace = ExitStats(), StringIO()
    with Machine("1M", accel, observer=vmexit.Tee([stats, JsonTrace(trace)])) as vm:
        vm.load_bytes(b"\xe6\x10\xe4\x20\xf4")
        vm.run(timeout=60)
    assert stats.total == 3
    assert stats.counts[("io out", "0x0010/1")] == 1
    assert len(trace.getvalue().splitlines()) == 3


def test_an_observer_that_raises_ends_the_run(accel):
    class Full(ExitStats):
        def io(self, *arguments) -> None:
            raise OSError(28, "No space left on device")

    with Machine("1M", accel, observer=Full()) as vm:
        vm.load_bytes(b"\xe6\x10\xf4")
        with pytest.raises(OSError, match="No space left"):
            vm.run(timeout=60)


def test_the_time_stamp_counter_of_the_software_cpu_begins_at_0():
    with Machine("1M", "soft") as vm:
        vm.load_bytes(bytes.fromhex("0f31 48c1e220 4809d0 f4"), mode="long")  # rdtsc; rax; hlt
        vm.run(timeout=60)
        # Less than a minute of any processor, where the host's has counted since it was started.
        assert 0 < vm.vcpus[0].regs.rax < 60 * 10_000_000_000


def test_a_device_is_held_and_told_although_another_one_fails_at_the_end_of_a_run(accel, tmp_path):
    """What the guest puts out cannot be written: the devices behind the serial port are told."""
    # mov dx, 0x3f8; mov al, "A"; out dx, al; out 0xf4, al: before a timer writes it out
    text = b"\xba\xf8\x03\xb0\x41\xee\xe6\xf4\xeb\xfe"
    with Machine(
        memory="2M", accel=accel, machine="microvm", serial="file:/dev/full", rng=True
    ) as vm:
        vm.load_bytes(text, at=0x1000)
        with pytest.raises(HostError, match="No space left on device"):
            vm.run(timeout=60)
        assert vm._parts.devices["rng"]._held


def test_a_balloon_that_outlives_its_machine(accel):
    with Machine(memory="2M", accel=accel, machine="microvm", balloon=0) as vm:
        balloon = vm.balloon
        registers = vm._parts.devices["balloon"]
        registers.write(v.MMIO_DRIVER_FEATURES_SEL, 4, 1)
        registers.write(v.MMIO_DRIVER_FEATURES, 4, 1)
        registers.write(v.MMIO_STATUS, 4, v.FEATURES_OK | v.DRIVER_OK)
        assert registers.read(v.MMIO_STATUS, 4) & v.DRIVER_OK
    balloon.set_target(4096)
    balloon.ask_for_statistics()
