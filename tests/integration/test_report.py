"""`vmexit report`: pages of real runs in a real browser, and what it says to bad input."""

import json
import re
import subprocess
from itertools import pairwise

import pytest
from browser import open_page
from command import GUESTS, SLOW, VMEXIT, assert_one_line, vmexit
from kernels import busybox_initrd, debian_kernel


def report(trace, page):
    done = vmexit("report", trace, "-o", page)
    assert done.status == 0, done
    return done


@pytest.mark.linux
def test_a_report_of_a_boot_in_a_browser(tmp_path):
    """Debian's kernel, until the time is over: the file ends in the middle of its start."""
    trace, page = tmp_path / "boot.json", tmp_path / "boot.html"
    command = [
        *VMEXIT, "run", "--accel", "soft", "--kernel", debian_kernel("cloud-amd64"), "--initrd",
        busybox_initrd(), "--append", "console=ttyS0", "--smp", "2", "--trace", trace,
        "--trace-format", "chrome", "--serial", "null", "--timeout", 4 * SLOW,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=100, check=False)
    assert done.returncode == 124, done.stderr
    told = report(trace, page).out
    shown = open_page(page)
    assert shown.console == []
    events = json.loads(trace.read_text())["traceEvents"]
    tracks: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["dur"]))
    assert len(tracks) >= 5
    for spans in tracks.values():  # Perfetto nests them where they overlap, or gives up
        spans.sort()
        assert all(a + b <= c + 1e-3 for (a, b), (c, _) in pairwise(spans))
    exits = sum(event.get("cat") == "exit" for event in events)
    assert exits > 1000
    assert told == f"{exits} exits: {page}\n"
    assert shown.text("summary").startswith(f"{exits:,} exits")
    assert "soft accelerator" in shown.text("summary")
    assert re.match(r"io (out|in) [\d,]+", shown.text("timeline"))
    assert len(re.findall(r'<path d="M[^"]+" data-series=', shown.html)) >= 3
    assert re.search(r"vCPU 0 guest [\d.,]+ m?s \([\d.]+ %\), host", shown.text("vcpus"))
    assert "0x3f8 UART" in shown.text("ports")
    assert re.search(r"0xfee00\w\w\w LAPIC", shown.text("mmio"))
    assert "UART" in shown.text("devices")
    assert re.match(r"0x0\.\.0x7ffffff → 0x7\w+\.\.0x7\w+ 128 MiB", shown.text("memory"))
    assert "looks at pieces of 2 MiB" in shown.text("memory")
    assert re.search(r'style="background: rgba\(', shown.html)
    assert not re.search(r"(src|href)=", shown.html)
    picture = tmp_path / "boot.png"
    open_page(page, f"--screenshot={picture}", "--window-size=1100,1000")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000


def test_a_report_of_lines_shows_what_they_know(accel, tmp_path):
    trace, page = tmp_path / "lines", tmp_path / "lines.html"
    vmexit("run", "--accel", accel, GUESTS / "counter.bin", "--trace", trace)
    report(trace, page)
    shown = open_page(page)
    assert shown.console == []
    assert shown.text("summary").startswith("11 exits")
    assert shown.text("ports").endswith("port name exits reads writes 0x10 10 0 10")
    assert shown.text("reasons") == "reason exits io out 10 hlt 1"
    assert "--trace-format chrome does" in shown.text("notes")


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&<!--\u2028"


def test_nothing_in_a_trace_becomes_html(tmp_path):
    trace, page = tmp_path / "<b>&.json", tmp_path / "page.html"
    exit = {
        "cat": "exit", "ph": "X", "tid": 1, "ts": 1, "dur": 2, "name": HOSTILE,
        "args": {"exit": "io", "dir": "out", "port": 16, "device": HOSTILE},
    }  # fmt: skip
    other = {**exit, "args": {"exit": HOSTILE}}
    about = {"version": HOSTILE, "accelerator": HOSTILE, "slots": [{"gpa": HOSTILE}]}
    trace.write_text(json.dumps({"otherData": about, "traceEvents": [exit, other]}))
    report(trace, page)
    written = page.read_text()
    assert written.count("<script") == 2 and "<img" not in written
    shown = open_page(page)
    assert shown.console == []
    cut = HOSTILE[:64]
    for part in ("devices", "reasons", "ports", "summary", "timeline"):
        assert cut.strip() in shown.text(part), part
    assert shown.html.count("<script") == 2 and "<img" not in shown.html
    assert shown.text("source").startswith("<b>&.json: vmexit </script>")


def test_the_policy_of_the_page_lets_only_its_own_script_run(tmp_path):
    trace, page = tmp_path / "trace", tmp_path / "page.html"
    trace.write_text('{"t":0,"vcpu":0,"exit":"hlt"}\n')
    report(trace, page)
    evil = tmp_path / "evil.html"
    evil.write_text(
        page.read_text().replace("</main>", "</main><script>document.title='ran'</script>")
    )
    shown = open_page(evil)
    assert "<title>trace: vmexit report</title>" in shown.html
    assert len(shown.console) == 1 and "Content Security Policy" in shown.console[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("\x7fELF", "no JSON at character 0"),
        ("{}", "has no exits"),
        ('{"traceEvents":[]}', "has no exits"),
        ("[1, 2]", "has no exits"),
    ],
)
def test_what_is_no_trace(tmp_path, content, why):
    trace, page = tmp_path / "trace", tmp_path / "page.html"
    trace.write_text(content)
    done = vmexit("report", trace, "-o", page)
    assert_one_line(done, 2, str(trace), why, "give a file that vmexit run --trace has written")
    assert not page.exists()


def test_files_that_cannot_be(tmp_path):
    trace = tmp_path / "trace"
    trace.write_text('{"t":0,"vcpu":0,"exit":"hlt"}\n')
    assert_one_line(vmexit("report", "/nowhere"), 2, "/nowhere", "No such file")
    assert_one_line(vmexit("report", tmp_path), 2, "Is a directory")
    assert_one_line(vmexit("report", trace, "-o", tmp_path), 2, "cannot write", "Is a directory")
    assert_one_line(vmexit("report", trace, "-o", trace), 2, "is the trace itself")
    assert trace.read_text() == '{"t":0,"vcpu":0,"exit":"hlt"}\n'
