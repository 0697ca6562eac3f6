"""Pure data: the numbers and structures that the kernel and the guest define. No behaviour."""
