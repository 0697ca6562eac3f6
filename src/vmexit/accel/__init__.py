"""Accelerators: what executes guest code. KVM, or the software CPU, behind one interface."""
