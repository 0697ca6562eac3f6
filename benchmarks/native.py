"""The C programs of this folder, compiled when they are first needed, and running them."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from measure import Unavailable

FOLDER = Path(__file__).resolve().parent
BUILD = FOLDER / "build"

TIMEOUT = 120  # seconds, for what takes some at most

_OPTIONS = ("-O2", "-Wall", "-Wextra")


def program(name: str, *options: str) -> Path:
    """The executable made from NAME.c."""
    return _compile(name, BUILD / name, *options)


def library(name: str) -> ctypes.CDLL:
    """NAME.c as a library, to run in this process; ctypes lets go of the GIL meanwhile."""
    return ctypes.CDLL(str(_compile(name, BUILD / f"{name}.so", "-shared", "-fPIC")))


def run_loop() -> Callable[[int, int, int, int], int]:
    """`run_loop()` of kvm_loop.c."""
    function = library("kvm_loop").run_loop
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int64)
    function.restype = ctypes.c_int64
    typed: Callable[[int, int, int, int], int] = function
    return typed


def run(*command: str | Path) -> str:
    """What the command prints. Raises Unavailable, with its first complaint, if it fails."""
    arguments = [str(word) for word in command]
    name = Path(arguments[0]).name
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{name} took more than {TIMEOUT} s") from error
    if done.returncode:
        said = done.stderr.strip().split("\n")[0]
        raise Unavailable(f"{name} failed with status {done.returncode}: {said}")
    return done.stdout


def _compile(name: str, output: Path, *options: str) -> Path:
    source = FOLDER / f"{name}.c"
    newest = max(path.stat().st_mtime for path in (source, *FOLDER.glob("*.h")))
    if output.exists() and output.stat().st_mtime > newest:
        return output
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("there is no C compiler `cc`; install gcc or clang")
    BUILD.mkdir(exist_ok=True)
    run(compiler, *_OPTIONS, *options, "-o", output, source)
    return output
