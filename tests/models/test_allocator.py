import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lwfed.models import allocator
from lwfed.models.allocator import PROBES, SMALL, give_back, let_code_go, read_code_in_pages

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["let_code_go", "read_code_in_pages"])
def test_a_process_goes_on_with_less(way):
    program = f"""
import torch
from lwfed.models.allocator import give_back, {way}
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssFile"))
before = resident()
{way}()
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


def test_only_what_is_as_in_its_file_and_never_written_is_let_go(tmp_path, monkeypatch):
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


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice on files")
@pytest.mark.parametrize(("brought", "large"), [(PROBES * SMALL, False), (PROBES * SMALL + 4096, True)])
def test_libraries_in_large_pieces_are_dropped_from_the_cache_of_files(tmp_path, monkeypatch, brought, large):
    """All that have code, but for those that have been replaced; in what the system has in small pieces nothing changes."""
    library, dropped = tmp_path / "library.so", []
    library.write_bytes(b"code")
    (tmp_path / "smaps").write_text(
        SMAPS + SMAPS.replace("/usr/bin/a program", str(library)) + SMAPS.replace("/usr/bin/a program", "/gone")
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: System("madvise"))
    monkeypatch.setattr(allocator, "_probed", lambda mapping, _: brought)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *given: dropped.append((os.readlink(f"/proc/self/fd/{file}"), *given)))
    read_code_in_pages(tmp_path / "smaps")
    assert dropped == ([(str(library), 0, 0, os.POSIX_FADV_DONTNEED)] if large else [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_probe_tells_what_a_look_at_some_pages_of_a_file_brings(tmp_path):
    pages = 64 * PROBES
    (tmp_path / "file").write_bytes(os.urandom(pages * mmap.PAGESIZE))
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapping = next(one for one in allocator._mappings(Path("/proc/self/smaps")) if one.file == str(tmp_path / "file"))
        assert (mapping.size, mapping.resident, mapping.as_in_file) == (len(mapped), 0, True)
        assert PROBES * mmap.PAGESIZE <= allocator._probed(mapping, Path("/proc/self/smaps")) <= mapping.size
