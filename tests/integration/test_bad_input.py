"""What is wrong ends the command with one line: the thing, the remedy, the contract's status."""

import os
import subprocess
from pathlib import Path

import pytest
from command import GUESTS, VMEXIT, assert_one_line, vmexit
from kernels import debian_kernel, initrd_with

HELLO = GUESTS / "hello.bin"


@pytest.fixture
def image(tmp_path):
    def image(data: bytes) -> Path:
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return image


# Images.


def test_missing_image():
    assert_one_line(vmexit("run", "/nonexistent/image"), 2, "/nonexistent/image", "check the path")
    assert_one_line(vmexit("inspect", "/nonexistent/image"), 2, "check the path")


def test_unreadable_image(image, tmp_path):
    path = image(b"\xf4")
    path.chmod(0)
    if os.geteuid() == 0:
        # root may read everything: become nobody, who may not even look into the folder
        done = vmexit("run", path, prefix=["setpriv", "--reuid=65534", "--clear-groups"])
    else:
        done = vmexit("run", path)
    assert_one_line(done, 2, str(path), "Permission denied", "make it readable")


def test_empty_image(image):
    assert_one_line(vmexit("run", image(b"")), 2, "is empty")


def test_directory_as_image(tmp_path):
    assert_one_line(vmexit("run", tmp_path), 2, str(tmp_path), "is a directory")


def test_fifo_as_image(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert_one_line(vmexit("run", tmp_path / "fifo"), 2, "not a regular file")


def test_too_large_image(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2 << 20)
    assert_one_line(vmexit("run", path, "-m", "1M"), 2, str(path), "2097152", "more --memory")


def test_image_that_does_not_fit_where_it_is_loaded(image):
    done = vmexit(
        "run", image(bytes(8192)), "-m", "64K", "--load-address", "0xf000", "--entry", "0xf000"
    )
    assert_one_line(done, 2, "8192 bytes at 0xf000", "more --memory or another --load-address")


def test_image_that_does_not_reach_the_entry(image):
    done = vmexit("run", image(bytes(12)))
    message = "entry 0x1000 lies outside the image (12 bytes at 0x0); use --load-address 0x1000"
    assert_one_line(done, 2, message)


def test_elf_file_as_image():
    assert_one_line(vmexit("run", "/bin/true"), 2, "64-bit ELF", "`vmexit inspect /bin/true`")


def test_other_files_that_are_not_flat_images(image):
    assert_one_line(vmexit("run", image(b"\x1f\x8b\x08" + bytes(9999))), 2, "gunzip")
    kernel = bytes(0x202) + b"HdrS" + bytes(9999)
    assert_one_line(vmexit("run", image(kernel)), 2, "a Linux kernel", "--kernel")
    sector = bytes(510) + b"\x55\xaa"
    remedy = "--load-address 0x7c00 --entry 0:0x7c00"
    assert_one_line(vmexit("run", image(sector)), 2, "a boot sector", remedy)


def test_an_image_that_is_loaded_elsewhere_but_started_where_it_is_not(image):
    done = vmexit("run", image(bytes(34)), "--load-address", "0x7c00")
    assert_one_line(done, 2, "entry 0x1000 lies outside the image (34 bytes at 0x7c00)", "0x7c00")
    assert "use --entry 0x7c00" in done.err


def test_nothing_to_run():
    assert_one_line(vmexit("run"), 2, "give an IMAGE, --kernel F or --firmware F")


def test_image_and_firmware():
    assert_one_line(vmexit("run", HELLO, "--firmware", HELLO), 2, "give one of them")
    assert_one_line(vmexit("run", "--firmware", HELLO, "--mode", "long"), 2, "leave out")


def test_firmware_of_an_odd_size(image):
    assert_one_line(vmexit("run", "--firmware", image(bytes(5000))), 2, "5000 bytes", "4096")


def test_firmware_with_too_little_memory(image):
    done = vmexit("run", "--firmware", image(bytes(65536)), "-m", "512K")
    assert_one_line(done, 2, "--memory 1M")


# Memory.


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("0", ["0 bytes", "--memory"]),
        ("-1", ["--memory"]),
        ("1", ["whole 4096-byte pages", "--memory 1M"]),
        ("128", ["128 bytes", "--memory 128M"]),
        ("1000000", ["whole 4096-byte pages", "--memory 999424"]),
        ("512T", ["more than this host has"]),
        ("99999999999999999999", ["--memory"]),
        ("lots", ["'lots'", "128M"]),
        ("12X", ["'12X'"]),
        ("", ["128M"]),
    ],
)
def test_memory_sizes_that_cannot_be(size, words):
    assert_one_line(vmexit("run", HELLO, f"--memory={size}"), 2, *words)


def test_memory_too_small_for_the_tables_of_long_mode():
    done = vmexit("run", HELLO, "-m", "8K", "--mode", "long")
    assert_one_line(done, 2, "--memory")


# Devices and options.


def test_overlapping_devices():
    done = vmexit("run", HELLO, "--debugcon", "0x3f8")
    assert_one_line(done, 2, "port 0x3f8", "overlaps", "give one another address")
    assert_one_line(vmexit("run", HELLO, "--debug-exit", "0x3ff"), 2, "overlaps")
    assert_one_line(vmexit("run", HELLO, "--debugcon", "0xf4"), 2, "overlaps")


def test_a_rom_over_the_memory_of_the_test_device(tmp_path):
    rom = tmp_path / "rom"
    with open(rom, "wb") as file:
        file.truncate(16 << 20)
    done = vmexit("run", "--firmware", rom, "--device", "testdev", "--accel", "soft")
    assert_one_line(done, 2, "16777216 bytes", "testdev at 0xff000000", "leave out --device")


def test_modules_that_memory_has_no_room_for_are_not_read(tmp_path):
    module, kernel = tmp_path / "module", GUESTS / "multiboot.kernel"
    with open(module, "wb") as file:
        file.truncate(5 << 20)
    modules = ",".join([str(module)] * 3)
    done = vmexit("run", "-m", "16M", "--kernel", kernel, "--initrd", modules)
    assert_one_line(done, 2, str(module), "5242880 bytes, which is more than", "more --memory")
    done = vmexit("run", "--kernel", kernel, "--initrd", "")
    assert_one_line(done, 2, "--initrd names no file", "leave it out")


def test_a_kernel_that_no_memory_holds_is_not_read(tmp_path):
    kernel = tmp_path / "kernel"
    with open(kernel, "wb") as file:
        file.truncate((1 << 30) + 1)
    done = vmexit("run", "--kernel", kernel)
    assert_one_line(done, 2, str(kernel), "more than 1073741824", "use a smaller one")


@pytest.mark.parametrize("accel", ["auto", "kvm", "soft"])
def test_a_feature_that_no_accelerator_has(accel):
    if accel == "kvm" and not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm")
    done = vmexit("run", HELLO, "--accel", accel, "--cpu", "host,+tbm")
    assert_one_line(done, 4, "cannot offer tbm on this host", "leave +tbm out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cpu", ""], ["--cpu", "''", "use host or max"]),
        (["--cpu", "host,"], ["--cpu has a comma", "use ,+feature"]),
        (["--cpu", "host,+sse2,-sse2"], ["+sse2", "give one of them"]),
        (["--device", "testdev", "--device", "testdev"], ["testdev is given twice"]),
        (["--accel", "xen"], ["'xen'", "kvm"]),
        (["--mode", "virtual"], ["'virtual'"]),
        (["--timeout", "0"], ["seconds"]),
        (["--timeout", "soon"], ["'soon'"]),
        (["--timeout", "nan"], ["'nan'"]),
        (["--debug-exit", "70000"], ["'70000'", "0xffff"]),
        (["--debugcon", "0x402="], ["PORT=FILE"]),
        (["--debugcon", "x"], ["'x'"]),
        (["--load-address", "-1"], ["'-1'"]),
        (["--entry", "main"], ["'main'"]),
        (["--entry", "0:0x10000", "--load-address", "0x10000"], ["--entry 0x1000:0x0"]),
        (["--entry", "0x10000:0", "--load-address", "0x100000"], ["16 bits"]),
        (["--entry", "0:0x1000", "--mode", "long"], ["--mode real"]),
        (["--load-address", "0x10000000000000000"], ["is no address"]),
        (["--load-address", "0xfffffffff000"], ["load address", "use one from 0x0 to"]),
        (["--serial", "tcp:a\xff:5"], ["cannot listen", "another address"]),
        (["--serial", "printer"], ["'printer'", "stdio"]),
        (["--serial", "tcp:localhost"], ["tcp:HOST:PORT"]),
        (["--serial", "tcp:127.0.0.1:99999"], ["tcp:HOST:PORT"]),
        (["--serial", "file:/nonexistent/log"], ["/nonexistent/log", "another path"]),
        (["--serial", "unix:/nonexistent/socket"], ["/nonexistent/socket", "another address"]),
        (["--trace", "/nonexistent/trace"], ["/nonexistent/trace", "another path"]),
        (["--debugcon", "0xe9=/nonexistent/log"], ["/nonexistent/log", "another path"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
        (["--mode", "real", "--entry", "0x100000000", "--load-address", "0x100000000"], ["0x1000"]),
    ],
)
def test_options_that_cannot_be(arguments, words):
    assert_one_line(vmexit("run", HELLO, *arguments), 2, *words)


def test_a_trace_is_not_written_over_the_image_or_before_the_run(image, tmp_path):
    path = image(b"\xf4")
    done = vmexit("run", path, "--load-address", "0x1000", "--trace", path)
    assert_one_line(done, 2, "is what is to run", "another file")
    assert path.read_bytes() == b"\xf4"
    trace = tmp_path / "trace"
    trace.write_text("precious")
    assert vmexit("run", "/nonexistent", "--trace", trace).status == 2
    assert trace.read_text() == "precious"
    assert vmexit("run", path, "--load-address", "0x1000", "--trace", trace).status == 0
    assert trace.read_text().endswith('"exit":"hlt"}\n')
    assert "precious" not in trace.read_text()


def test_a_full_disk_ends_the_run_with_a_reason():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*VMEXIT, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    message = "vmexit: cannot write standard output: No space left on device; send it elsewhere\n"
    assert (done.returncode, done.stderr) == (4, message)
    done = vmexit("run", HELLO, "--serial", "file:/dev/full")
    assert_one_line(done, 4, "No space left on device")
    done = vmexit("run", GUESTS / "counter.bin", "--trace", "/dev/full")
    assert_one_line(done, 4, "/dev/full", "No space left on device", "another path")


def test_standard_error_that_is_closed_or_full_changes_no_status():
    for redirection in ("2>&-", "2>/dev/full"):
        command = " ".join(map(str, [*VMEXIT, "run", "/nonexistent/image"]))
        done = subprocess.run(
            ["sh", "-c", f"{command} {redirection}"], stdout=subprocess.PIPE, check=False
        )
        assert (done.returncode, done.stdout) == (2, b""), redirection
        command = " ".join(map(str, [*VMEXIT, "run", GUESTS / "debug-exit.bin", "--stats"]))
        done = subprocess.run(["sh", "-c", f"{command} {redirection}"], check=False)
        assert done.returncode == 67, redirection  # the guest's


def test_names_that_standard_output_cannot_show(tmp_path):
    path = tmp_path / "h\u00e9.bin"
    path.write_bytes(b"\xf4")
    done = vmexit("inspect", path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.status, "h\\xe9.bin: a flat image" in done.out) == (0, True)


def limited(limit: str, *arguments: object):
    return vmexit(*arguments, prefix=["sh", "-c", f'ulimit {limit}; exec "$@"', "sh"])


@pytest.mark.kvm
def test_too_few_descriptors():
    for number in range(5, 12):
        done = limited(f"-n {number}", "run", HELLO, "--accel", "kvm")
        if done.status != 0 and "vmexit: " in done.err:  # Python itself needs some
            assert_one_line(done, done.status, "; ")
            assert done.status in (2, 4)


def test_too_little_address_space_for_the_software_cpu():
    done = limited("-v 1000000", "run", HELLO, "--accel", "soft")
    assert_one_line(done, 4, "1024 MiB for translated code", "ulimit -v")


def test_a_small_image_needs_little_memory(image):
    assert limited("-v 500000", "inspect", image(b"\xf4")).status == 0


@pytest.mark.parametrize("option", ["--trace", "--debugcon"])
def test_a_fifo_that_nobody_reads(accel, tmp_path, option):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    where = fifo if option == "--trace" else f"0x10={fifo}"
    command = ["run", GUESTS / "out-loop.bin", "--accel", accel, "--timeout", "1", option, where]
    assert_one_line(vmexit(*command), 2, "nobody reads it" if option != "--trace" else str(fifo))
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # and never reads
    try:
        assert vmexit(*command).status == 124
    finally:
        os.close(reader)


# KVM.


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The environment in which KVM fails in the way that is asked for."""
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).with_name("kvm_shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return lambda how: {"SHIM": how, "LD_PRELOAD": str(library)}


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("version", ["KVM API version 11, not 12", "newer"]),
        ("busy", ["another hypervisor", "--accel soft"]),
        ("openbusy", ["busy", "--accel soft"]),
        ("denied", ["may not be opened", "usermod -aG kvm", "--accel soft"]),
        ("memory", ["not enough memory"]),
        ("slot", ["memory slot", "use less --memory"]),
        ("vcpu", ["create vCPU 0"]),
        ("run", ["KVM_RUN failed on vCPU 0: Bad address"]),
    ],
)
def test_kvm_that_fails(shim, how, words):
    assert_one_line(vmexit("run", HELLO, "--accel", "kvm", env=shim(how)), 4, *words)
    done = vmexit("doctor", env=shim(how))
    if how not in ("slot", "run"):
        assert "[--] kvm: " in done.out
    assert done.status == 0  # soft is usable


@pytest.mark.kvm
@pytest.mark.parametrize("how", ["version", "denied", "openbusy"])
def test_auto_takes_soft_where_kvm_is_not_usable_and_says_why(shim, how):
    done = vmexit("run", HELLO, env=shim(how))
    assert done.status == 0
    assert done.out == "Hello from real mode!\n"
    assert done.err.startswith("vmexit: accelerator soft: /dev/kvm ")


@pytest.mark.kvm
@pytest.mark.parametrize("how", ["busy", "slot", "vcpu"])
def test_auto_takes_soft_where_kvm_makes_no_vm(shim, how):
    done = vmexit("run", HELLO, env=shim(how))
    assert done.status == 0
    assert done.out == "Hello from real mode!\n"
    assert done.err.startswith("vmexit: accelerator soft: ")
    assert "KVM refused" in done.err or "/dev/kvm cannot make a VM" in done.err


@pytest.fixture
def without_kvm():
    """Run a command where /dev/kvm is not there: in a mount namespace with another /dev."""
    if os.geteuid() != 0:
        pytest.skip("hiding /dev/kvm needs root (CAP_SYS_ADMIN)")
    script = (
        "mount -t tmpfs none /mnt && touch /mnt/null /mnt/urandom && "
        "mount --bind /dev/null /mnt/null && mount --bind /dev/urandom /mnt/urandom && "
        'mount --move /mnt /dev && exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def test_no_dev_kvm(without_kvm):
    done = vmexit("run", HELLO, "--accel", "kvm", prefix=without_kvm)
    assert_one_line(done, 4, "/dev/kvm does not exist", "load kvm_intel", "--accel soft")
    done = vmexit("run", HELLO, prefix=without_kvm)
    assert done.status == 0
    assert done.out == "Hello from real mode!\n"
    assert done.err == "vmexit: accelerator soft: /dev/kvm does not exist\n"


def test_no_unicorn(tmp_path):
    (tmp_path / "unicorn.py").write_text("raise ImportError('not installed')\n")
    done = vmexit("run", HELLO, "--accel", "soft", env={"PYTHONPATH": str(tmp_path)})
    assert_one_line(done, 4, "needs Unicorn", "pip install unicorn==2.1.4")


def test_no_accelerator_at_all(tmp_path, without_kvm):
    (tmp_path / "unicorn.py").write_text("raise ImportError('not installed')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = vmexit("run", HELLO, env=env, prefix=without_kvm)
    assert_one_line(done, 4, "no accelerator is usable", "/dev/kvm", "pip install unicorn")
    assert vmexit("doctor", env=env, prefix=without_kvm).status == 4
    done = vmexit("doctor", "--cpuid", env=env, prefix=without_kvm)
    assert_one_line(done, 4, "no accelerator is usable", "vmexit doctor")
    assert "kvm: /dev/kvm does not exist" in done.out and "soft: " in done.out


def test_another_unicorn(tmp_path):
    (tmp_path / "unicorn.py").write_text("__version__ = '2.0.0'\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = vmexit("run", HELLO, "--accel", "soft", env=env)
    assert_one_line(done, 4, "Unicorn 2.0.0 is installed", "unicorn==2.1.4")


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("-drive", "--drive file=PATH"), ("-hda", "--drive file="), ("-nographic", "nothing"),
     ("--nosuch", "see vmexit run --help")],
)  # fmt: skip
def test_options_of_others_lead_to_ours(word, remedy):
    done = vmexit("run", GUESTS / "hello.bin", word, "disk.img")
    assert_one_line(done, 2, f"there is no {word}", remedy)


@pytest.mark.linux
def test_a_device_without_a_driver_is_told(tmp_path):
    options = ["--rng", "--balloon", "0", "--append", "console=ttyS0 quiet panic=-1"]
    kernel, initrd = debian_kernel("cloud-amd64"), initrd_with("cloud-amd64", "virtio_balloon")
    done = vmexit(
        "run", "--accel", "soft", "--kernel", kernel, "--initrd", initrd, *options,
        "--timeout", "90", stdin=b"poweroff -f\n",
    )  # fmt: skip
    assert done.status == 0
    assert_one_line(done, 0, "the guest had no driver for rng;", "vmexit fetch debian --modules")
