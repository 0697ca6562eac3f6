"""The guest side of devices: registers at offsets, free of addresses and accelerators."""
