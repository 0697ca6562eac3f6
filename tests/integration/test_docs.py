"""What the documentation shows is what happens: its commands print what it says they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
SOURCES = "\n".join(path.read_text() for path in ROOT.glob("src/**/*.py"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def sessions() -> list:
    found = []
    for page in PAGES:
        for number, block in enumerate(blocks(page, "console")):
            kvm = "minikvm" in block or "--accel kvm" in block
            marks = [pytest.mark.kvm] if kvm else []
            found.append(pytest.param(block, id=f"{page.name}-{number}", marks=marks))
    return found


def steps(block: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output that follows it."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts]


def matches(shown: str, printed: str) -> bool:
    """Whether the text is as shown; `...` stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in shown.rstrip("\n").split("..."))
    return re.fullmatch(pattern, printed.rstrip("\n"), re.DOTALL) is not None


@pytest.mark.parametrize("block", sessions())
def test_commands_print_what_is_shown(block):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    status = 0
    for command, shown in steps(block):
        if command == "echo $?":
            assert shown.strip() == str(status)
            continue
        if command.startswith("make "):
            continue  # would run these tests; CI runs the targets
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=100,
            check=False,
        )
        status = done.returncode
        printed, expected = (
            re.sub(r"^vmexit: (accelerator|fetching|unpacking) .*\n", "", text, flags=re.MULTILINE)
            for text in (done.stdout, shown)
        )
        assert matches(expected, printed), f"$ {command}\n{printed}"


def test_programs_in_the_documentation_run(tmp_path):
    pages = [ROOT / "README.md", ROOT / "docs" / "traces.md", ROOT / "docs" / "snapshots.md"]
    programs = [program for page in pages for program in blocks(page, "python")]
    assert len(programs) >= 3
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=100, cwd=tmp_path)


def test_there_are_sessions_in_the_documentation():
    assert len(sessions()) >= 6


def test_the_lines_that_how_a_vm_runs_quotes_are_in_the_sources():
    quoted = blocks(ROOT / "docs" / "how-a-vm-runs.md", "python")
    assert len(quoted) >= 10
    for block in quoted:
        assert block in SOURCES, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target
