"""An initial RAM disk that needs nothing but busybox: it loads modules, and runs a shell."""

import gzip
import stat
from collections.abc import Iterable

from vmexit.fetch.cpio import Entry, archive, executable, file, folder

_FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "root", "etc", "run", "mnt", "modules",
            "etc/udhcpc")  # fmt: skip

# A console may be there only now that its module is.
# cttyhack makes the console the shell's controlling terminal; without one Ctrl-C does nothing.
_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=linux ENV=/etc/shrc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ifconfig lo 127.0.0.1 up
for module in {modules}; do insmod /modules/$module.ko; done
command exec 9</dev/console 2>/dev/null && exec <&9 >/dev/console 2>&1 9<&-
root= mode=ro init=/sbin/init
for word in $(cat /proc/cmdline); do
  case $word in
    root=*) root=${{word#root=}} ;;
    ro | rw) mode=$word ;;
    init=*) init=${{word#init=}} ;;
  esac
done
if [ -n "$root" ]; then
  if mount -o $mode "$root" /mnt && [ -x "/mnt$init" -o -L "/mnt$init" ]; then
    umount /dev/shm /dev/pts
    for folder in dev proc sys; do mount -o move /$folder /mnt/$folder; done
    exec switch_root /mnt "$init"
  fi
  echo "vmexit: no $init on $root, so here is a shell; the modules loaded: {modules}"
fi
cat /etc/motd
cd /root
setsid cttyhack sh
echo "The shell has ended: power off."
poweroff -f
"""

# The shell takes its own commands before those in PATH. This init takes no signals, by which they
# would have it switch off: -f does without.
SHRC = "".join(
    f"{name}() {{ umount -a -r 2>/dev/null; command {name} -f; }}\n"
    for name in ("poweroff", "reboot", "halt")
)

# What busybox's DHCP client runs with what it was told, in variables.
DHCP = """\
#!/bin/sh
case $1 in
  deconfig) exec ip link set $interface up ;;
  bound | renew) ;;
  *) exit ;;
esac
ip addr flush dev $interface
[ -n "$mtu" ] && ip link set $interface mtu $mtu
ip addr add $ip/$mask dev $interface
for gateway in $router; do ip route add default via $gateway dev $interface; done
for server in $dns; do echo nameserver $server; done >/etc/resolv.conf
echo "$interface has $ip"
"""

MOTD = """\
vmexit guest: a busybox shell. `poweroff` ends it, `reboot` too; `udhcpc` sets eth0 up.
"""


def init_script(modules: Iterable[str] = ()) -> str:
    """What the guest runs first."""
    return _INIT.format(modules=" ".join(modules))


def initramfs(busybox: bytes, modules: list[tuple[str, bytes]]) -> bytes:
    """The gzipped archive. `modules` are loaded in this order."""
    entries = [folder(name) for name in _FOLDERS]
    # The kernel opens it for init before init can mount anything (the numbers are Linux's own,
    # Documentation/admin-guide/devices.txt).
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(executable("bin/busybox", busybox))
    entries.append(Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"))  # for rdinit=/bin/sh
    entries.append(executable("init", init_script(name for name, _ in modules).encode()))
    entries.append(file("etc/motd", MOTD.encode()))
    entries.append(file("etc/shrc", SHRC.encode()))
    entries.append(executable("etc/udhcpc/default.script", DHCP.encode()))
    entries += [file(f"modules/{name}.ko", content) for name, content in modules]
    return gzip.compress(archive(entries), 6, mtime=0)
