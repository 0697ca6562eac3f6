"""x86-64: address layout, registers, segments, page tables."""
