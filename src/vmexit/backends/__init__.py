"""The host side of devices: terminals, files, sockets."""
