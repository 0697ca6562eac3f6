"""The software CPU: Unicorn (QEMU's TCG as a library) behind the accelerator interface.

Unicorn is GPL-2.0 and is imported only when an engine is created.
"""
