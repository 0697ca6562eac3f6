#!/usr/bin/env python3
"""Build the test guests: NAME.S becomes NAME.bin, a flat image, or NAME.kernel for `vmexit run`.

Needs binutils (`as` and `ld`). The images are in the repository, so only who changes a guest
needs this.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent

_MODE = re.compile(r"^# mode: (real|protected|long|multiboot)$", re.MULTILINE)


class BuildError(Exception):
    """A guest cannot be built; the message says why, in one line."""


def _mode(source: Path) -> str:
    found = _MODE.search(source.read_text(encoding="ascii"))
    if found is None:
        raise BuildError(f"{source}: no line `# mode: real`, protected, long or multiboot; add one")
    return found[1]


_MODES: dict[str, str] = {source.stem: _mode(source) for source in sorted(SOURCES.glob("*.S"))}
# Every flat image by name, with the CPU mode that it starts in.
GUESTS = {name: mode for name, mode in _MODES.items() if mode != "multiboot"}
# And every multiboot kernel.
KERNELS = [name for name, mode in _MODES.items() if mode == "multiboot"]


def build(name: str, directory: Path) -> Path:
    """Build guest `name` into `directory`; returns the image. Raises BuildError."""
    script, suffix = ("multiboot.ld", "kernel") if name in KERNELS else ("flat.ld", "bin")
    image = directory / f"{name}.{suffix}"
    with tempfile.TemporaryDirectory() as temporary:
        linkable = Path(temporary) / f"{name}.o"
        # The sources choose 16, 32 or 64-bit code themselves.
        _run("as", "--64", "-I", SOURCES, "-o", linkable, SOURCES / f"{name}.S")
        _run("ld", "-m", "elf_x86_64", "-T", SOURCES / script, "-o", image, linkable)
    image.chmod(0o644)
    return image


def _run(tool: str, *arguments: str | Path) -> None:
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BuildError(f"`{tool}` is not installed; install binutils") from error
    if done.returncode:
        raise BuildError(f"{tool} failed: {' / '.join(done.stderr.split(chr(10))).strip(' /')}")


def main() -> int:
    """Build the guests that the arguments name, or all."""
    parser = argparse.ArgumentParser(description="Build the test guests.")
    parser.add_argument("guests", metavar="NAME", nargs="*", help="a guest; default: all")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=SOURCES, help="default: beside the sources"
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.guests if name not in _MODES]
    if unknown:
        parser.error(f"no guest {unknown[0]}; there are {', '.join(_MODES)}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in arguments.guests or _MODES:
            print(build(name, arguments.output))
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
