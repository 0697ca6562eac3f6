"""Virtio devices (Virtual I/O Device 1.2): queues, a transport, and devices that know neither."""
