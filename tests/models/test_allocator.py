import ctypes
import subprocess
import sys

import pytest

from lwfed.models.allocator import _untouched, give_back, let_code_go

SMAPS = """\
55d0c0a00000-55d0c0a01000 r--p 00000000 fe:00 1 /usr/bin/a program
Anonymous:             0 kB
55d0c0a01000-55d0c0a03000 r-xp 00001000 fe:00 1 /usr/bin/a program
Rss:                   8 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
55d0c0a03000-55d0c0a04000 r--p 00003000 fe:00 1 /usr/bin/a program
Anonymous:             4 kB
55d0c0a04000-55d0c0a05000 rw-p 00003000 fe:00 1 /usr/bin/a program
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 00:00 0
Anonymous:             0 kB
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
"""


def test_only_what_is_as_in_its_file_and_never_written_is_let_go():
    assert list(_untouched(SMAPS)) == [(0x55D0C0A00000, 0x55D0C0A01000), (0x55D0C0A01000, 0x55D0C0A03000)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_goes_on_with_less():
    program = """
import torch
from lwfed.models.allocator import give_back, let_code_go
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile"))
before = resident()
let_code_go()
after = resident()
give_back()
x = torch.ones(64, 64, requires_grad=True)
(x @ x).sum().backward()
print(before, after, x.grad.sum().item())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100).stdout.split()
    before, after = map(int, out[:2])
    assert after < before / 2
    assert float(out[2]) == 2 * 64**3


class System:
    """Of which a function that it has says what it was called with."""

    def __init__(self, name):
        self.calls = []
        setattr(self, name, lambda *given: self.calls.append([value if isinstance(value, int) else value.value for value in given]))


def test_the_system_is_asked_for_exactly_these_ranges(tmp_path, monkeypatch):
    system = System("madvise")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: system)
    (tmp_path / "smaps").write_text(SMAPS)
    let_code_go(tmp_path / "smaps")
    assert system.calls == [[0x55D0C0A00000, 0x1000, 4], [0x55D0C0A01000, 0x2000, 4]]
    give_back()  # this system has nothing for it


def test_where_the_system_lists_no_memory_nothing_is_let_go(tmp_path, monkeypatch):
    system = System("madvise")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: system)
    let_code_go(tmp_path / "missing")
    assert not system.calls
