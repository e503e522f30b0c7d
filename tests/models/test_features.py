import pytest
import torch

from lwfed.models import features
from lwfed.models.features import Folder, Layout, Memory, read, sealed, unsealed

BLOCKS = [torch.arange(20, dtype=torch.uint8).reshape(5, 4), torch.arange(20, 40, dtype=torch.uint8).reshape(5, 4)]


@pytest.fixture(params=["file", "memory"])
def make(request, tmp_path):
    return lambda room=1e9: Folder(tmp_path / "kept", room) if request.param == "file" else Memory(room)


def tokens(shape):
    """With channels of very different size."""
    found = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-1, 3, shape[-1] if len(shape) == 2 else shape[0])
    return found * (sizes if len(shape) == 2 else sizes[:, None, None])


@pytest.mark.parametrize(("shape", "positions", "channels"), [((16, 32), (1,), 32), ((8, 4, 4), (2, 3), 8)])
def test_int8_is_within_half_a_step_of_each_channel(shape, positions, channels):
    layout, given = Layout(shape, "int8"), tokens(shape)
    data = layout.encode(given)
    assert (data.dtype, tuple(data.shape)) == (torch.uint8, (6, layout.bytes))
    assert layout.bytes == given[0].numel() + 2 * channels
    found = layout.decode(data)
    half_a_step = given.abs().amax(positions) / 127 / 2
    error = (found.float() - given).abs().amax(positions)
    assert found.shape == given.shape
    assert (error <= half_a_step * 1.25).all(), "float16 adds 1/2048 of a number, and of a scale, which has 127 steps"
    assert (error > 0.5 * half_a_step).any()


def test_int8_rounds_halves_to_even_and_keeps_zeros():
    layout = Layout((5, 2), "int8")
    given = torch.tensor([[[127.0, 0.0], [0.5, 0.0], [1.5, 0.0], [-0.5, 0.0], [-2.5, 0.0]]])
    assert layout.decode(layout.encode(given))[0].T.tolist() == [[127, 0, 2, 0, -2], [0] * 5]


def test_fp16_is_rounded_as_torch_does():
    layout, given = Layout((16, 32), "fp16"), tokens((16, 32))
    assert torch.equal(layout.decode(layout.encode(given)), given.half())
    assert layout.bytes == 16 * 32 * 2


def test_a_row_is_rounded_by_itself(monkeypatch):
    layout, given = Layout((16, 32), "int8"), tokens((16, 32))
    data = layout.encode(given)
    found = layout.decode(data)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 4)
    assert torch.equal(layout.encode(given), data)
    assert torch.equal(layout.decode(data[5:]), found[5:])


@pytest.mark.parametrize("kept_as", ["fp16", "int8"])
def test_what_is_not_finite_stays_so(kept_as):
    layout = Layout((3, 1), kept_as)
    assert not layout.decode(layout.encode(torch.tensor([[[1.0], [torch.nan], [2.0]]]))).isfinite().all()


@pytest.mark.parametrize("at", [0, 3, 4, 7])
def test_a_flipped_bit_shows_in_its_row_alone(at):
    data = sealed(BLOCKS[0])
    assert data.shape == (5, 8)
    rows, intact = unsealed(data)
    assert torch.equal(rows, BLOCKS[0])
    assert intact.all()
    data[2, at] ^= 16
    assert unsealed(data)[1].tolist() == [True, True, False, True, True]
    assert not unsealed(torch.zeros(1, 8, dtype=torch.uint8))[1].any(), "as a disk gives that has lost a sector"


def test_bytes_are_mended_where_they_lie(make):
    place = make()
    place.room()
    place.write("a", BLOCKS, 1e9)
    place.mend("a", 4, BLOCKS[1][:2])
    assert read(place, "a", torch.arange(4), 4, slice(0, 4)).tolist() == [
        [0, 1, 2, 3],
        [20, 21, 22, 23],
        [24, 25, 26, 27],
        [12, 13, 14, 15],
    ]
    assert place.size("a") == 40


def test_rows_are_read_in_any_order_some_bytes_of_each(make):
    place = make()
    assert (place.names(), place.size("a")) == ([], None)
    place.room()
    place.write("a", BLOCKS, 1e9)
    assert (place.names(), place.size("a")) == (["a"], 40)
    assert read(place, "a", torch.tensor([9, 0, 4]), 4, slice(1, 3)).tolist() == [[37, 38], [1, 2], [17, 18]]
    with pytest.raises(OSError, match="shorter"):
        read(place, "a", torch.tensor([10]), 4, slice(0, 4))


@pytest.mark.parametrize(("room", "rows"), [(0, 0), (31, 7), (20, 5), (1e9, 10)])
def test_only_whole_rows_that_have_room_are_kept(make, room, rows):
    place = make()
    place.room()
    place.write("a", iter(BLOCKS), room)
    assert place.size("a") == 4 * rows


def test_what_is_kept_takes_room_until_it_is_forgotten(make):
    place = make(room=100)
    assert place.room() == 100
    place.write("a", BLOCKS, 100)
    place.write("b", BLOCKS[:1], 100)
    assert place.room() == 40
    place.forget(but="b")
    assert (place.names(), place.room()) == (["b"], 80)
    place.forget()
    assert place.names() == []
    with pytest.raises(FileNotFoundError):
        read(place, "b", torch.tensor([0]), 4, slice(0, 4))
