"""`vmexit symbols`: what it prints and writes, and how it refuses."""

import subprocess

from command import VMEXIT, assert_one_line, vmexit
from nested_guest import DEBUG_EXIT, build


def test_it_prints_what_nm_prints(tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT)
    listed = subprocess.run(["nm", kernel], capture_output=True, text=True, check=True).stdout
    done = vmexit("symbols", kernel)
    assert (done.status, done.err) == (0, "")
    assert sorted(done.out.splitlines()) == sorted(listed.splitlines())
    assert done.out.splitlines() == sorted(done.out.splitlines(), key=lambda line: line[:16])


def test_a_kernel_that_has_a_symbol_table_is_written_as_it_is(tmp_path) -> None:
    kernel, output = build(tmp_path, DEBUG_EXIT), tmp_path / "output"
    assert vmexit("symbols", kernel, "--output", output) == (0, "", "")
    assert output.read_bytes() == kernel.read_bytes()


def test_what_cannot_be_is_refused_in_one_line(tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT)
    before = kernel.read_bytes()
    assert_one_line(vmexit("symbols", kernel, "-o", kernel), 2, "is the kernel", "another file")
    assert kernel.read_bytes() == before
    assert_one_line(vmexit("symbols", kernel, "-o", tmp_path), 4, "Is a directory", "another path")
    assert_one_line(vmexit("symbols", tmp_path / "no"), 2, "No such file", "check the path")
    text = tmp_path / "text"
    text.write_text("0000000000001000 T a\n")
    assert vmexit("symbols", text) == (0, "0000000000001000 T a\n", "")
    assert_one_line(vmexit("symbols", text, "-o", tmp_path / "o"), 2, "no kernel", "vmlinuz")
    assert not (tmp_path / "o").exists()
    subprocess.run(["strip", kernel], check=True)
    assert_one_line(vmexit("symbols", kernel), 2, str(kernel), "no symbols", "System.map")


def test_a_reader_that_has_enough_ends_it_quietly(tmp_path) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"{n:016x} T name_{n}\n" for n in range(1, 50_000)))
    with subprocess.Popen(
        [*VMEXIT, "symbols", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13
