"""A headless Chromium that opens a page, and tells what its script has made of it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
from command import SLOW

SECONDS = 60 * SLOW


class Page(NamedTuple):
    """The document as it was once scripts had run, and what they said on the console."""

    html: str
    console: list[str]

    def text(self, part: str) -> str:
        """The text in the element with this id, its pieces parted by spaces."""
        reader = _Text(part)
        reader.feed(self.html)
        return " ".join(reader.words)


def open_page(path: Path, *options: str) -> Page:
    """Open a file; skips where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install --no-install-recommends chromium")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={path.parent}/chromium", "--enable-logging=stderr", *options,
            *(() if options else ("--dump-dom",)), path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    console = re.findall(r":CONSOLE[:(].*", done.stderr)
    return Page(done.stdout, console)


class _Text(HTMLParser):
    """The text within one element."""

    _VOID = frozenset(("meta", "link", "br", "img", "input"))

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part
        self._depth = 0
        self.words: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in self._VOID and (self._depth or ("id", self._part) in attributes):
            self._depth += 1

    def handle_endtag(self, tag):
        if self._depth:
            self._depth -= 1

    def handle_data(self, data):
        if self._depth and data.strip():
            self.words.append(data.strip())
