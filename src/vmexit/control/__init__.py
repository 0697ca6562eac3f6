"""Protocols by which other programs look into a machine and steer it, over sockets."""
