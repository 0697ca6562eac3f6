"""`vmexit top`: a running machine's numbers in a terminal, over QMP."""

from vmexit.top.watch import once, watch

__all__ = ["once", "watch"]
