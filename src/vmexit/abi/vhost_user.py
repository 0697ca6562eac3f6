"""Numbers of the vhost-user protocol (QEMU, docs/interop/vhost-user.rst).

All is in the byte order of the host.
"""

import struct

HEADER = struct.Struct("=III")  # request, flags, size of what follows
VERSION, REPLY, NEED_REPLY = 0x1, 0x4, 0x8
VERSION_MASK = 0x3

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG = 17, 18, 24

F_PROTOCOL_FEATURES = 30  # a bit of the device's features
PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK, PROTOCOL_F_CONFIG = 0, 3, 9

U64 = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")  # index, number
VRING_ADDR = struct.Struct("=IIQQQQ")  # index, flags, descriptors, used, available, log
MEMORY = struct.Struct("=I4x")  # number of regions
REGION = struct.Struct("=QQQQ")  # guest address, size, our address, offset in its file
CONFIG = struct.Struct("=III")  # offset, size, flags
