"""Kernels and initial RAM disks made from the packages of a distribution."""
