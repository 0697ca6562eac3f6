"""What is compiled of vmexit; the rest of its description is in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import setup

compiled = cythonize("src/vmexit/core/_steps.pyx", build_dir="build/cython")
for extension in compiled:
    extension.optional = True  # without a compiler, or Python's headers, there is the Python for it

setup(ext_modules=compiled)
