import io
import sys

import pytest

from lwfed.console import Console


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "\u6f22 \u00e9; \\x1b[2J \\u2028."),
        ("latin-1", "\\u6f22 \u00e9; \\x1b[2J \\u2028."),
        ("cp437", "\\u6f22 \u00e9; \\x1b[2J \\u2028."),
    ],
)
def test_whatever_a_device_says_is_one_line_of_what_the_terminal_can_show(monkeypatch, encoding, shown):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    Console().say("news", "\u6f22 \u00e9\n\x1b[2J \u2028.")
    stdout.flush()
    assert stdout.buffer.getvalue().decode(encoding).split("  ", 1)[1] == f"{shown}\n"
