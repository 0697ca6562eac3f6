"""Numbers of <linux/if_tun.h>: network interfaces whose other end is a file descriptor."""

import struct

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x4004_54CA, 0x4004_54D0, 0x4004_54D8
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8

IFNAMSIZ = 16
SIOCGIFMTU = 0x8921  # linux/sockios.h
ifreq_mtu = struct.Struct("16si20x")
ifreq = struct.Struct("16sH22x")  # name and flags; a union with longer members
