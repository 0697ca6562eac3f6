"""Boot: putting an image into guest memory, and the registers that it starts with."""
