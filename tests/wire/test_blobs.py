from __future__ import annotations

import errno
import hashlib
import os
import shutil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.blobs import BlobStore
from lwfed.errors import DiskTrouble, InvalidPayload, StateError

DATA = Random(0).randbytes(5 * 1024)


@pytest.fixture
def store(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def pieces(data: bytes, size: int = 1024) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def test_a_blob_is_named_by_its_content(store):
    ref = store.put(DATA)
    assert ref.id == hashlib.sha256(DATA).hexdigest()
    assert store.put(DATA) == ref == store.ref(ref.id)
    assert store.read(ref.id) == store.path(ref.id).read_bytes() == DATA


def test_a_file_is_moved_in(store, tmp_path):
    for _ in range(2):
        (tmp_path / "made").write_bytes(DATA)
        assert store.read(store.adopt(tmp_path / "made").id) == DATA
        assert not (tmp_path / "made").exists()


def test_what_is_not_held_is_an_error_that_names_it(store):
    assert not store.has("ab" * 32)
    with pytest.raises(StateError, match="abababababab"):
        store.read("ab" * 32)


def test_a_rotten_blob_is_found_and_removed(store, tmp_path):
    ref = store.put(DATA)
    store.path(ref.id).write_bytes(DATA[:-1] + b"!")
    again = BlobStore(tmp_path / "blobs")
    assert not again.has(ref.id)
    assert not (tmp_path / "blobs" / ref.id).exists()
    assert again.put(DATA) == ref


def test_a_blob_that_somebody_deleted_is_missed(store):
    ref = store.put(DATA)
    store.path(ref.id).unlink()
    assert not store.has(ref.id)


def test_what_a_crash_left_half_written_is_cleared(store, tmp_path):
    (tmp_path / "blobs" / "temporary-xyz").write_bytes(b"half")
    BlobStore(tmp_path / "blobs")
    assert not (tmp_path / "blobs" / "temporary-xyz").exists()


def test_a_manifest_describes_every_chunk(store):
    manifest = store.manifest(store.put(DATA + b"x").id, 1024)
    assert manifest.digests == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces(DATA + b"x"))
    assert [store.chunk(manifest, index) for index in range(6)] == pieces(DATA + b"x")
    assert store.manifest(store.put(b"").id, 1024).digests == ()


def test_forget_keeps_what_it_is_told(store, tmp_path):
    kept, dropped = store.put(b"kept"), store.put(b"dropped")
    other = BlobStore(tmp_path / "other")
    parts = [store.part(other.manifest(other.put(data).id, 1024)) for data in (b"a", b"b")]
    store.forget({kept.id, parts[0].manifest.blob.id})
    assert store.has(kept.id)
    assert not store.has(dropped.id)
    assert [path.name[:64] for path in (tmp_path / "blobs" / "parts").iterdir()] == [parts[0].manifest.blob.id]
    store.remove(kept.id)
    assert not store.has(kept.id)


@pytest.mark.parametrize(("index", "data"), [(0, b"short"), (0, DATA[1024:2048]), (5, DATA[:1024]), (-1, DATA[:1024])])
def test_a_chunk_that_does_not_fit_is_refused(store, tmp_path, index, data):
    other = BlobStore(tmp_path / "other")
    part = store.part(other.manifest(other.put(DATA).id, 1024))
    with pytest.raises(InvalidPayload):
        part.write(index, data)
    assert part.missing() == [0, 1, 2, 3, 4]


def test_a_part_goes_on_where_another_process_left_it(store, tmp_path):
    other = BlobStore(tmp_path / "other")
    manifest = other.manifest(other.put(DATA).id, 1024)
    part = store.part(manifest)
    assert part.write(3, pieces(DATA)[3])
    assert not part.write(3, pieces(DATA)[3])
    resumed = BlobStore(tmp_path / "blobs").part(manifest)
    assert resumed.missing() == [0, 1, 2, 4]
    assert resumed.have_bytes == 1024
    with pytest.raises(InvalidPayload, match="lacks 4 chunks"):
        resumed.commit()


def test_a_manifest_that_lies_about_the_whole_is_found_out(store, tmp_path):
    other = BlobStore(tmp_path / "other")
    honest = other.manifest(other.put(DATA).id, 1024)
    liar = honest.model_copy(update={"digests": honest.digests[::-1]})
    part = store.part(liar)
    for index, piece in enumerate(reversed(pieces(DATA))):
        part.write(index, piece)
    with pytest.raises(InvalidPayload, match="name promises"):
        part.commit()
    assert not store.has(honest.blob.id)
    assert part.missing() == [0, 1, 2, 3, 4]
    assert part.write(0, pieces(DATA)[4])


def test_a_part_of_a_blob_that_arrived_otherwise_is_done(store, tmp_path):
    other = BlobStore(tmp_path / "other")
    manifest = other.manifest(other.put(DATA).id, 1024)
    part = store.part(manifest)
    store.put(DATA)
    assert part.commit().read_bytes() == DATA
    assert list((tmp_path / "blobs" / "parts").iterdir()) == []


def test_folders_of_others_stay_where_they_are(tmp_path):
    store = BlobStore(tmp_path / "blobs")
    kept, gone = store.put(b"kept"), store.put(b"gone")
    for folder in ("lost+found", "parts/@eaDir"):
        (tmp_path / "blobs" / folder).mkdir()
    store.forget({kept.id})
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted([kept.id, "lost+found", "parts"])
    assert not store.has(gone.id)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, DiskTrouble),
        (errno.EDQUOT, DiskTrouble),
        (errno.EIO, DiskTrouble),
        (errno.EACCES, StateError),
        (errno.EROFS, StateError),
    ],
)
def test_a_disk_that_may_recover_ends_a_service_so_that_it_is_started_again(tmp_path, monkeypatch, code, kind):
    store = BlobStore(tmp_path / "blobs")
    held = store.put(b"data" * 1000)
    manifest = store.manifest(held.id, 1024)

    def broken(*_, **__):
        raise OSError(code, os.strerror(code))

    for name, call in (
        ("os.replace", lambda: store.put(b"more")),
        ("pathlib.Path.read_bytes", lambda: store.read(held.id)),
        ("pathlib.Path.open", lambda: store.chunk(manifest, 1)),
        ("pathlib.Path.open", lambda: store.manifest(held.id, 2048)),
        ("os.scandir", lambda: store.forget(())),
        ("pathlib.Path.unlink", lambda: store.remove(held.id)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(StateError, match="check free space and permissions") as raised:
                call()
        assert type(raised.value) is kind
    assert store.read(held.id) == b"data" * 1000


def test_an_unwritable_place_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="check free space"):
        BlobStore(tmp_path / "file" / "blobs")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), content=st.binary(max_size=9000), size=st.sampled_from([1024, 1500, 4096]))
def test_chunks_in_any_order_with_loss_doubles_and_damage_converge(tmp_path_factory, data, content, size):
    folder = tmp_path_factory.mktemp("property")
    source, target = BlobStore(folder / "source", durable=False), BlobStore(folder / "target", durable=False)
    manifest = source.manifest(source.put(content).id, size)
    part = target.part(manifest)
    while part.missing():
        arriving = data.draw(st.lists(st.tuples(st.sampled_from(part.missing()), st.booleans()), max_size=12))
        for index, damaged in arriving:
            chunk = source.chunk(manifest, index)
            if damaged:
                with pytest.raises(InvalidPayload):
                    part.write(index, bytes([chunk[0] ^ 1]) + chunk[1:])
            else:
                part.write(index, chunk)
        if data.draw(st.booleans()):
            before, part = part.missing(), target.part(manifest)  # the process was restarted
            assert part.missing() == before
        if not arriving:
            part.write(part.missing()[0], source.chunk(manifest, part.missing()[0]))
    assert part.commit().read_bytes() == content
    shutil.rmtree(folder)
