"""A simulated disk: what was synced survives a power cut, of the rest anything may."""

from random import Random

import pytest

from lwfed import disk
from lwfed.tools.faults.disk import Disk

CUTS = 60


@pytest.fixture
def cut(tmp_path):
    """What `write` leaves below a folder, in many power cuts: name -> content each."""

    def cut(write):
        found = []
        for seed in range(CUTS):
            folder = tmp_path / str(seed)
            folder.mkdir()
            model = Disk()
            with disk.instead(model.sync):
                write(folder)
            model.lose_power(folder, Random(seed))
            found.append({path.name: path.read_bytes() for path in folder.iterdir()})
        return found

    return cut


def test_what_is_written_durably_is_there_whole(cut):
    assert cut(lambda folder: disk.write(folder / "one.bin", b"content")) == [{"one.bin": b"content"}] * CUTS


def test_what_takes_its_place_is_there_whole_or_not_at_all(cut):
    def write(folder):
        disk.write(folder / "one.bin", b"old")
        (folder / "new").write_bytes(b"new")
        disk.sync(folder / "new")
        (folder / "new").replace(folder / "one.bin")

    assert {found["one.bin"] for found in cut(write)} == {b"old", b"new"}


def test_what_is_not_synced_is_lost_torn_or_there(cut):
    def write(folder):
        (folder / "one.bin").write_bytes(b"0123456789")
        disk.sync(folder)

    contents = {found["one.bin"] for found in cut(write)}
    assert {b"", b"0123456789"} < contents
    assert any(len(content) == 10 and b"\0" in content for content in contents)


def test_a_file_may_be_lost_with_its_name_and_come_back_after_it_was_deleted(cut):
    def write(folder):
        disk.write(folder / "deleted.bin", b"content")
        (folder / "deleted.bin").unlink()
        (folder / "nameless.bin").write_bytes(b"content")
        disk.sync(folder / "nameless.bin")

    found = cut(write)
    for name in ("deleted.bin", "nameless.bin"):
        assert {one.get(name) for one in found} == {None, b"content"}


def test_of_a_file_that_is_written_anew_in_place_some_may_be_old(cut):
    def write(folder):
        disk.write(folder / "one.bin", b"a" * 3000)
        with (folder / "one.bin").open("r+b") as file:
            file.write(b"b" * 3000)

    contents = {found["one.bin"] for found in cut(write)}
    assert {b"a" * 3000, b"b" * 3000} < contents
    assert any(len(content) == 3000 and {*content} == {*b"ab"} for content in contents)


def test_a_power_cut_is_the_last_word_on_what_came_before_it(tmp_path):
    model = Disk()
    (tmp_path / "one.bin").write_bytes(b"0123456789")
    model.lose_power(tmp_path, Random(1))
    once = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for seed in range(20):
        model.lose_power(tmp_path, Random(seed))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == once
