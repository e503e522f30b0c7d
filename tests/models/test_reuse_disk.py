"""Where tokens of reused views are kept: with too little room, on a disk that loses or damages them, and through kills."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lwfed.models import features
from lwfed.models.features import Folder, Memory

from .reusing import EVERYWHERE, RECORD, Counting


@pytest.mark.parametrize("room", [0, 13 * RECORD + 5])
def test_what_has_no_room_is_computed_each_time(device, room):
    one = device("train.epochs=3")
    one.train(3, room=room)
    assert one.files[0].stat().st_size == room // RECORD * RECORD
    assert one.work > 2 * (room // RECORD) * 2 + 2
    (text,) = one.told
    assert f"those of {40 - room // RECORD} of 40 pairs are computed each time; allow more" in text
    limited = one.train(3, room=room)
    assert limited == one.train(3)
    assert one.files[0].stat().st_size == 40 * RECORD  # there is room now
    one.train(3)
    assert one.work == 2


def test_where_the_configuration_gives_no_room_it_is_that_which_is_named(device):
    one = device("train.features_mb=0")
    one.train(3, room=0)
    assert one.told[0].endswith("those of 40 of 40 pairs are computed each time; raise train.features_mb from 0 to 1")


def test_where_the_disk_has_no_room_it_is_the_disk_that_is_named(device, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=13 * RECORD / features.FREE_SHARE))
    one = device()
    one.train(3, room=30 * RECORD)
    assert one.told[0].endswith("those of 27 of 40 pairs are computed each time; free some space on the disk of the state directory")


def test_where_memory_has_no_room_it_is_memory_that_is_named(device, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(features, "_fill", no_memory)
    one = device()
    one.train(3, place=Memory(EVERYWHERE))
    assert one.told[0].endswith("those of 40 of 40 pairs are computed each time; free some memory")


def test_a_file_that_leaves_no_room_for_the_next_one_goes_first(device):
    one = device()
    one.train(2, room=60 * RECORD)
    one.train(3, room=60 * RECORD)
    assert one.work == 2 * 80 + 2
    assert [file.stat().st_size for file in one.files] == [40 * RECORD]


def test_a_kill_while_the_file_is_made_changes_nothing(device):
    one = device()
    one.train(2)
    undisturbed = one.train(3)
    for file in one.files:
        file.unlink()
    one.train(2)
    (one.folder / "0-0.part").write_bytes(bytes(39 * RECORD))
    assert one.train(3, room=85 * RECORD) == undisturbed
    assert one.work == 80 + 2  # through what is new only
    assert len(one.files) == 1


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_a_file_that_is_lost_while_it_trains_costs_time_only(device, spoil):
    one = device("train.epochs=3")
    whole = one.train(3)
    assert one.train(3, on_rows=None, before=lambda: spoil(one.files[0])) == whole
    assert one.work > 80


def flip(file, *at):
    content = bytearray(file.read_bytes())
    for one in at:
        content[one] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_is_computed_anew_put_right_and_said(device):
    one = device()
    whole = one.train(3)
    kept = one.files[0].read_bytes()
    flip(one.files[0], 3, 21 * RECORD - 1, 21 * RECORD)  # tokens, a checksum, tokens
    assert one.train(3) == whole
    assert one.told == [
        "features of views that are used again have been damaged: they are computed anew; check the disk of the state directory"
    ]
    assert 2 < one.work <= 2 * 2 * 2 * 8 + 2, "two layers for two views of two batches at most, and not of all rows"
    for round in range(2, 12):
        one.train(3, round=round)  # until each row has been drawn
    assert one.files[0].read_bytes() == kept
    one.train(3)
    assert (one.work, one.told) == (2, [])


def test_what_was_damaged_is_not_passed_on_to_the_next_stage(device):
    one = device()
    one.train(2)
    flip(one.files[0], 5 * RECORD)
    rolled = one.train(3)
    assert one.work == 80 + 8 + 2  # one layer for all, and another for the first view of a batch
    assert len(one.told) == 1
    shutil.rmtree(one.folder)
    assert rolled == one.train(3)


def test_int8_damaged_is_computed_with_what_it_was_computed_with(device, monkeypatch):
    """ONNX Runtime's int8 has scales of a micro-batch: here any row changes the others."""
    through = Counting.__call__
    monkeypatch.setattr(Counting, "__call__", lambda self, x, skip: through(self, x, skip) + x.mean())
    one = device()
    whole = one.train(3)
    flip(one.files[0], *range(0, 40 * RECORD, RECORD))
    assert one.train(3) == whole
    assert one.work > 2


def test_a_folder_that_cannot_be_made_costs_time_only(device):
    one = device("train.epochs=3")
    one.folder.write_text("in the way")
    one.train(3)
    assert one.work > 2 * 80
    Folder(one.folder).forget()


def test_a_disk_that_takes_no_file_is_said_by_its_own_words(device, monkeypatch):
    """As one that has no inode left, which other files are found on all the same."""
    one, opened = device(), Path.open

    def refuse(path, mode="r", *given, **named):
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *given, **named)

    monkeypatch.setattr(Path, "open", refuse)
    one.train(3)
    assert one.told == ["features of views that are used again cannot be kept (No space left on device): they are computed each time"]
