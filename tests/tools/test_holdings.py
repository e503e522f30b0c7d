import pytest

from lwfed.blobs import BlobStore
from lwfed.errors import InvalidPayload, StateError
from lwfed.tools.simulation.holdings import BorrowedBlobs


@pytest.fixture
def lender(tmp_path):
    return BlobStore(tmp_path / "server", durable=False)


def test_a_device_holds_what_it_has_downloaded_and_not_what_the_server_has(lender):
    ref = lender.put(bytes(3000))
    device, other = BorrowedBlobs(lender), BorrowedBlobs(lender)
    manifest = lender.manifest(ref.id, 1024)
    part = device.part(manifest)
    assert (part.missing(), part.have_bytes) == ([0, 1, 2], 0)
    assert [part.write(index, lender.chunk(manifest, index)) for index in (2, 0, 0)] == [True, True, False]
    with pytest.raises(InvalidPayload, match="lacks 1"):
        part.commit()
    part.write(1, lender.chunk(manifest, 1))
    assert (part.complete, part.have_bytes) == (True, 3000)
    assert part.commit().read_bytes() == device.read(ref.id) == bytes(3000)
    assert device.has(ref.id)
    assert not other.has(ref.id)
    with pytest.raises(StateError):
        other.path(ref.id)


def test_a_damaged_chunk_is_refused(lender):
    manifest = lender.manifest(lender.put(bytes(3000)).id, 1024)
    with pytest.raises(InvalidPayload):
        BorrowedBlobs(lender).part(manifest).write(0, b"\x01" * 1024)


def test_what_the_server_has_deleted_is_fetched_anew(lender):
    ref = lender.put(b"old")
    device = BorrowedBlobs(lender, [ref.id])
    assert device.has(ref.id)
    lender.remove(ref.id)
    assert not device.has(ref.id)


def test_forgetting_touches_nobody_else(lender):
    ref = lender.put(b"model")
    device = BorrowedBlobs(lender, [ref.id])
    device.forget([])
    assert not device.has(ref.id)
    assert lender.has(ref.id)
