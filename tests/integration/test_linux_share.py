"""Linux's own clients of shared folders: 9P, which we serve, and virtio-fs by virtiofsd."""

import hashlib
import os
import re
import stat
from pathlib import Path

import pytest
from command import FEWER, FULL, SLOW
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, SECONDS, Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300 * SLOW)]
LONG = 3600 if FULL else 300 * SLOW

FLAVOUR = "amd64"  # the kernel for clouds has no 9P
MODULES = ("9p", "9pnet_virtio", "virtiofs")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
P9 = "-t 9p -o trans=virtio,"
MIB = 1 << 20

# Ends with "all done" if each step does what it would do on any file system.
EXERCISE = """
set -e
fail() { echo "failed: $1"; exit 1; }
same() { [ "$1" = "$2" ] || fail "$1 is not $2"; }
cd /mnt; mkdir w; cd w
echo one >a; same "$(cat a)" one
echo two >b; mv b a; same "$(cat a)" two; [ ! -e b ] || fail b
mkdir -p d1/d2 e; mv a d1/d2/a; mv d1/d2 e/d3; same "$(cat e/d3/a)" two
ln e/d3/a hard; echo three >>hard; same "$(cat e/d3/a | tr '\\n' ' ')" "two three "
same "$(stat -c %h hard)" 2
ln -s e/d3/a soft; same "$(head -n 1 soft)" two; same "$(readlink soft)" e/d3/a
ln -s /nowhere dangling; [ -L dangling ] || fail L; [ ! -e dangling ] || fail e
long=$(printf %0255d 0); echo long >$long; same "$(cat $long)" long
if echo x >1$long; then fail long; fi
chmod 4751 hard; same "$(stat -c %a hard)" 4751
chmod 600 hard; same "$(stat -c %a e/d3/a)" 600
(umask 027; touch u; mkdir ud); same "$(stat -c %a u)-$(stat -c %a ud)" 640-750
touch -d '2001-02-03 04:05:06' hard; same "$(stat -c %Y hard)" 981173106
truncate -s 100000 t; same "$(stat -c %s t)" 100000; truncate -s 3 t; same "$(stat -c %s t)" 3
for i in $(seq 100); do echo $i >>app; done; same "$(md5sum <app)" "$(seq 100 | md5sum)"
printf 0123456789 >part; printf ab | dd of=part bs=1 seek=4 conv=notrunc
same "$(cat part)" 0123ab6789
mkfifo p; echo through >p & same "$(cat p)" through
exec 3<part; rm part; same "$(cat <&3)" 0123ab6789; exec 3<&-
if rmdir e; then fail rmdir; fi
mkdir in; (cd in; mv ../in ../moved; echo x >file; same "$(cat ../moved/file)" x; cd ..; pwd)
cp /bin/busybox busybox; same "$(./busybox echo runs)" runs
same "$(dd if=busybox bs=64k | md5sum)" "$(md5sum </bin/busybox)"
mkdir many; for i in $(seq 1000); do : >many/file$i; done; same "$(ls many | wc -l)" 1000
same "$(find many -type f | wc -l)" 1000; mv many/file500 many/other; rm -r many
rm soft dangling; mv hard kept; sync; df . >/dev/null
echo all done
"""


def boot(*shares: str, mount: str = "", limit: float = SECONDS) -> Guest:
    """With the first of the shares at /mnt."""
    options = [word for share in shares for word in ("--share", share)]
    options += ["--timeout", str(limit)]
    initrd = initrd_with(FLAVOUR, *MODULES)
    guest = Guest(debian_kernel(FLAVOUR), initrd, "quiet", *options, accel=ACCEL)
    guest.boot()
    if mount:
        assert guest.run(f"mount {mount} && echo yes") == "yes"
    return guest


def share(folder: Path, mount: str) -> str:
    """The folder, served by whom the client in `mount` wants."""
    if "9p" in mount:
        return f"src={folder}"
    if not os.access(VIRTIOFSD, os.X_OK) or os.geteuid() != 0:
        pytest.skip(
            f"no {VIRTIOFSD} (apt-get install qemu-system-common), or not root, as it wants"
        )
    return f"src={folder},virtiofsd={VIRTIOFSD}"


@pytest.mark.parametrize(
    "mount", [f"{P9}version=9p2000.L", f"{P9}version=9p2000.L,cache=loose", "-t virtiofs"]
)
def test_a_share_is_a_file_system(tmp_path, mount):
    (tmp_path / "exercise").write_text(EXERCISE)
    with boot(share(tmp_path, mount), mount=f"{mount} src /mnt") as guest:
        log = guest.run("sh /mnt/exercise 2>&1")
        assert log.endswith("all done"), log
        bad = "(9p|fuse|virtiofs).*(error|bad|fail)|BUG:|WARNING:"
        # The KVM lab's processor has one warning of its own.
        assert not guest.run(f"dmesg | grep -E '{bad}' | grep -v fpu__init_system_xstate")
        guest.power_off()
    made = tmp_path / "w"
    names = {"app", "d1", "e", "kept", "moved", "p", "busybox", "t", "u", "ud", "0" * 255}
    assert set(os.listdir(made)) == names
    assert (made / "kept").read_text() == "two\nthree\n" == (made / "e" / "d3" / "a").read_text()
    status = (made / "kept").stat()
    assert (status.st_nlink, status.st_mode, status.st_mtime) == (2, 0o100600, 981173106)
    assert stat.S_ISFIFO((made / "p").lstat().st_mode)
    assert stat.S_IMODE((made / "ud").stat().st_mode) == 0o750
    assert (made / "app").read_text() == "".join(f"{n}\n" for n in range(1, 101))


def test_guest_and_host_see_each_others_files(tmp_path):
    data = os.urandom(MIB) * 50
    (tmp_path / "big").write_bytes(data)
    other = tmp_path / "other"
    other.mkdir()
    outside = tmp_path / "outside"
    shared = tmp_path / "shared, too"
    shared.mkdir()
    outside.write_text("outside")
    (shared / "out").symlink_to("../outside")
    (shared / "away").symlink_to(tmp_path)
    big = f"big={tmp_path},readonly=on"
    with boot(
        f"src={str(shared).replace(',', ',,')}", big, mount=f"{P9}msize=262144 src /mnt"
    ) as guest:
        tags = guest.run(
            "cat /sys/bus/virtio/drivers/9pnet_virtio/virtio*/mount_tag | tr '\\0' ' '"
        )
        assert tags.split() == ["src", "big"]
        (shared / "new").write_text("from the host")
        assert guest.run("cat /mnt/new") == "from the host"
        guest.run("echo from the guest >>/mnt/new")
        assert (shared / "new").read_text() == "from the hostfrom the guest\n"
        (shared / "new").unlink()
        assert "No such file" in guest.run("cat /mnt/new 2>&1")
        for name in ("out", "away/outside"):  # the guest's own links, which it follows itself
            assert "No such file" in guest.run(f"cat /mnt/{name} 2>&1; ls /mnt/{name} 2>&1")
        assert guest.run("ls /mnt/.. | grep -c outside") == "0"
        guest.run("mkdir /big; mount -t 9p -o trans=virtio,msize=512000 big /big")
        assert guest.run("sha256sum </big/big").split()[0] == hashlib.sha256(data).hexdigest()
        guest.run("head -c 5000000 /big/big >/mnt/copy")
        assert (shared / "copy").read_bytes() == data[:5_000_000]
        assert "No such file" in guest.run("mount -t 9p -o trans=virtio none /tmp 2>&1")
        guest.power_off()
    assert outside.read_text() == "outside"


def test_a_share_that_is_to_be_read_only(tmp_path):
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    before = {p: p.stat().st_ctime_ns for p in (tmp_path, *tmp_path.iterdir())}
    changes = (
        "echo x >file", "echo x >>file", ">new", "mkdir new", "rm file", "rmdir folder",
        "mv file new", "ln file new", "ln -s x new", "chmod 777 file", "touch file",
        "truncate -s 0 file", "mkfifo new", "chown 5 file",
    )  # fmt: skip
    with boot(f"src={tmp_path},readonly=on", mount=f"{P9}rw src /mnt") as guest:
        for change in changes:
            said = guest.run(f"(cd /mnt; {change}) 2>&1")
            assert "Read-only file system" in said, (change, said)
        assert guest.run("cat /mnt/file; ls -1 /mnt").split() == ["contentfile", "folder"]
        guest.power_off()
    assert {p: p.stat().st_ctime_ns for p in (tmp_path, *tmp_path.iterdir())} == before


@pytest.mark.soak
@pytest.mark.timeout(2 * LONG)
@pytest.mark.parametrize("mount", [f"{P9}cache=none", f"{P9}cache=loose", "-t virtiofs"])
def test_a_folder_with_10_000_files(tmp_path, mount):
    # To make, read or remove one takes 100 ms in the lab, where the guest does so with fewer.
    count = 5000 // FEWER
    lines = "".join(f"{n}\n" for n in range(count))
    for n in range(10_000 - count):
        (tmp_path / f"host{n:04}").write_text(f"{n}\n")
    digest = hashlib.sha256(lines.encode()).hexdigest()
    with boot(share(tmp_path, mount), mount=f"{mount} src /mnt", limit=2 * LONG) as guest:

        def run(command: str) -> str:
            return guest.run(command, LONG)

        run(f"for i in $(seq {count}); do echo $i >/mnt/guest$i; done")
        assert run("ls -l /mnt | wc -l") == "10001"
        names = f"$(printf '/mnt/host%04d ' $(seq 0 {count - 1}))"
        assert run(f"cat {names} | sha256sum").split()[0] == digest
        assert run("find /mnt -name '*99' | wc -l") == "100"
        assert len(os.listdir(tmp_path)) == 10_000
        run(f"cd /mnt; for i in $(seq {count // 5}); do mv guest$i moved$i; done; cd")
        run(f"rm {names}")
        assert run("ls /mnt | wc -l") == str(10_000 - count)
        guest.power_off()
    left = [path.name for path in Path(tmp_path).iterdir()]
    assert len(left) == 10_000 - count
    assert sum(name.startswith("moved") for name in left) == count // 5
    assert (tmp_path / "moved15").read_text() == "15\n"
    assert (tmp_path / f"guest{count}").read_text() == f"{count}\n"


def test_a_virtiofsd_that_cannot_be_is_told(tmp_path):
    initrd = initrd_with(FLAVOUR, *MODULES)
    for option, words in (
        ("virtiofsd=/nowhere", "there is no program /nowhere; give virtiofsd's path"),
        (
            "virtiofsd=/bin/false",
            "cannot share .*: it ended at once with status 1; see",
        ),
        ("virtiofsd=/bin/false,readonly=on", "not each virtiofsd can be read-only; leave one"),
    ):
        options = ["--share", f"src={tmp_path},{option}"]
        with Guest(debian_kernel(FLAVOUR), initrd, "quiet", *options, accel=ACCEL) as guest:
            assert guest.status() in (2, 4)
            assert re.search(words, guest.output.decode()), guest.output
