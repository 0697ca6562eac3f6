"""Machines: config → builder → machine."""
