"""pytest for kernels: with vmexit installed, tests have machines as fixtures.

See `vmexit.testing.plugin` for the fixtures, and docs/pytest.md for how to use them.
"""
