"""The committed guest images are what their sources build to. Needs binutils."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

GUESTS_DIRECTORY = Path(__file__).resolve().parents[2] / "guests"


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guest_build", GUESTS_DIRECTORY / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def test_each_source_has_its_image_and_each_image_its_source() -> None:
    images = {image.stem for image in GUESTS_DIRECTORY.glob("*.bin")}
    assert images == set(build.GUESTS)
    kernels = {image.stem for image in GUESTS_DIRECTORY.glob("*.kernel")}
    assert kernels == set(build.KERNELS)


@pytest.mark.parametrize("name", [*build.GUESTS, *build.KERNELS])
def test_image_is_what_its_source_builds_to(name: str, tmp_path: Path) -> None:
    built = build.build(name, tmp_path)
    committed = (GUESTS_DIRECTORY / built.name).read_bytes()
    assert built.read_bytes() == committed, f"{built.name} is stale: run guests/build.py {name}"


@pytest.mark.parametrize("name", build.GUESTS)
def test_image_starts_behind_a_page_of_zeros(name: str) -> None:
    image = (GUESTS_DIRECTORY / f"{name}.bin").read_bytes()
    assert image[:0x1000] == bytes(0x1000)
    assert len(image) > 0x1000


def test_missing_tool_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="`as` is not installed; install binutils"):
        build.build("hello", tmp_path)


def test_source_without_mode_is_named(tmp_path: Path) -> None:
    source = tmp_path / "modeless.S"
    source.write_text("# No mode.\n")
    with pytest.raises(build.BuildError, match=r"modeless\.S: no line `# mode: real`"):
        build._mode(source)
