import subprocess
import sys
import tracemalloc
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lwfed.cloud_server.serve import check_sources
from lwfed.config import load_config
from lwfed.data import archive, open_source
from lwfed.data.kept import KeptPixels
from lwfed.data.load import auxiliary_images, device_images, labelled_images
from lwfed.errors import DataError

SET = ("data.partition=even", "data.devices=3", "data.min_images=2", "calibration.every=never", "evaluation.data=null")


def config(*settings):
    return load_config("demo", [*SET, *settings])


def pictures(first, count, *shape):
    """Image n is filled with the value n."""
    return np.broadcast_to(np.arange(first, first + count).reshape(-1, *(1 for _ in shape)), (count, *shape)).astype(np.uint8)


@pytest.fixture
def make(tmp_path):
    """MedMNIST's layout: 30 images for training and 12 for validation of classes 3, 5 and 9, and 6 to test by; with changes."""

    def make(save=np.savez_compressed, name="blood.npz", **changes):
        kinds = np.array([[3], [5], [9]], np.uint8)
        arrays = {
            "train_images": pictures(0, 30, 8, 8), "train_labels": np.tile(kinds, (10, 1)),
            "val_images": pictures(30, 12, 8, 8), "val_labels": np.tile(kinds, (4, 1)),
            "test_images": pictures(100, 6, 8, 8), "test_labels": np.tile(kinds, (2, 1)),
            **changes,
        }  # fmt: skip
        path = tmp_path / name
        save(path, **{key: value for key, value in arrays.items() if value is not None})
        return str(path)

    return make


def values(images):
    return images.pixels[:][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kept", [True, False])
def test_devices_share_what_is_for_training_and_no_image_twice(make, tmp_path, save, kept):
    spec, settings = make(save), config()
    shares = [device_images(spec, settings, number, tmp_path / f"kept{number}" if kept else None) for number in range(3)]
    assert sorted(chain(*map(values, shares))) == list(range(42))
    assert [len(share) for share in shares] == [14] * 3
    assert isinstance(shares[0].pixels, KeptPixels) == kept
    assert all(share.pixels.shape[1:] == (3, 16, 16) for share in shares)


def test_a_kept_share_is_read_again_when_the_file_changes(make, tmp_path):
    spec, settings, done = make(), config(), []

    def read():
        done.clear()
        return values(device_images(spec, settings, 1, tmp_path / "kept", lambda *progress: done.append(progress)))

    first = read()
    assert done[-1] == (14, 14)
    assert (read(), done) == (first, [])
    make(train_images=pictures(200, 30, 8, 8), val_images=pictures(230, 12, 8, 8))
    assert read() == [value + 200 for value in first]


def test_evaluation_takes_the_test_split(make):
    found = labelled_images(config(f"evaluation.data={make()}"))
    assert values(found) == [100, 101, 102, 103, 104, 105]
    assert found.classes == ("3", "5", "9")
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("without", [{"test_images": None, "test_labels": None}, {"test_labels": None}])
def test_without_a_test_split_a_share_is_kept_for_evaluation(make, without):
    spec = make(**without)
    settings = config(f"evaluation.data={spec}", "data.labelled_share=0.5")
    found = labelled_images(settings)
    assert np.bincount(found.labels).tolist() == [7, 7, 7]
    of_devices = [value for number in range(3) for value in values(device_images(spec, settings, number))]
    assert sorted(values(found) + of_devices) == list(range(42))


def test_the_server_s_share_is_kept_back_by_file_name_wherever_the_file_lies(make, tmp_path):
    spec = make()
    settings = config("calibration.every=round", "calibration.data=/srv/sets/blood.npz", "data.auxiliary_share=0.5")
    of_devices = [value for number in range(3) for value in values(device_images(spec, settings, number))]
    kept_back = values(auxiliary_images(config("calibration.every=round", f"calibration.data={spec}", "data.auxiliary_share=0.5")))
    assert sorted(of_devices + kept_back) == list(range(42))
    assert len(kept_back) == 21


def test_auxiliary_images_of_another_domain_cost_the_devices_nothing(make):
    spec, other = make(), make(name="path.npz", train_images=pictures(100, 30, 5, 7, 3))
    settings = config("calibration.every=round", f"calibration.data={other}", "data.auxiliary_share=0.5")
    assert sum(len(device_images(spec, settings, number)) for number in range(3)) == 42
    assert auxiliary_images(settings).pixels.shape == (21, 3, 16, 16)


def test_auxiliary_images_need_no_labels_whatever_the_partition_of_the_devices(make):
    spec = make(train_labels=None)
    settings = config("calibration.every=round", f"calibration.data={spec}", "data.partition=classes", "data.auxiliary_share=0.5")
    assert len(auxiliary_images(settings)) == 21


@pytest.mark.parametrize("partition", ["dirichlet", "classes"])
@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, "it has no train_labels"),
        (np.zeros((30, 14), np.uint8), r"its train_labels are \[30, 14\], not one for each of 30 images"),
        (np.zeros((30, 8, 8), np.uint8), "not one for each of 30 images"),
        (np.zeros(30, np.float32), "its train_labels are <f4, no integers"),
    ],
)
def test_partitions_by_class_say_why_there_are_none_and_others_do_without(make, partition, labels, reason):
    spec = make(train_labels=labels)
    with pytest.raises(DataError, match=rf"data.partition {partition} needs one class per image.*{reason}.*use even or quantity"):
        device_images(spec, config(f"data.partition={partition}", "data.classes_per_device=1"), 0)
    assert len(device_images(spec, config("data.partition=quantity"), 0)) >= 2
    with pytest.raises(DataError, match=reason):
        check_sources(config(f"evaluation.data={make(train_labels=labels, test_labels=None)}"))


def test_the_sub_folders_partition_is_for_folders(make):
    with pytest.raises(DataError, match="deals the sub-folders of a folder"):
        device_images(make(), config("data.partition=folders"), 0)


def test_the_quick_check_counts_what_is_for_training(make):
    assert open_source(make()).check() == 42
    assert open_source(make(val_images=None)).check() == 30


def test_others_learn_neither_path_nor_name(make):
    assert open_source(make()).label == "npz"


def test_another_process_finds_it_from_wherever_it_works(make, monkeypatch, tmp_path):
    path = make()
    monkeypatch.chdir(tmp_path)
    assert open_source("blood.npz").path == path
    assert open_source("digits").path == "digits"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_device_never_holds_the_whole_set(make, tmp_path, save):
    spec = make(save, train_images=np.zeros((20_000, 32, 32), np.uint8), train_labels=np.zeros(20_000, np.uint8))
    settings = config("data.devices=100")
    tracemalloc.start()
    device_images(spec, settings, 7, tmp_path / "kept")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 < 20_000 * 32 * 32


def test_the_quick_check_needs_no_numpy(make):
    script = f"import sys; from lwfed.data import open_source as o; o({make()!r}).check(); print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"no array train_images, but test_images, test_labels, .*: name the arrays as MedMNIST"),
        ({"train_images": np.zeros((4, 8, 8), np.float32)}, r"train_images is <f4 \[4, 8, 8\]; images are uint8"),
        ({"train_images": np.zeros((4, 8, 8, 8), np.uint8)}, r"uint8 \[4, 8, 8, 8\]; images are uint8 \[N, height, width\]"),
        ({"val_images": np.zeros((4, 64), np.uint8)}, r"val_images is uint8 \[4, 64\]"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8)}, "it takes 1 to"),
        ({"train_images": np.asfortranarray(np.zeros((4, 8, 8), np.uint8))}, "stored by columns"),
        ({"train_images": np.array(["a", {}], dtype=object)}, "not the plain array"),
        ({"train_images": np.zeros(3, [("a", "u1")])}, "not the plain array"),
    ],
)
def test_arrays_of_another_kind_are_refused(make, changes, message):
    with pytest.raises(DataError, match=message):
        open_source(make(**changes)).check()


def test_a_set_of_too_many_images_is_refused(make, monkeypatch):
    monkeypatch.setattr(archive, "MAX_IMAGES", 29)
    with pytest.raises(DataError, match="1 to 29 images"):
        open_source(make()).check()


def test_a_file_that_is_cut_short_or_is_something_else_is_refused(make, tmp_path):
    whole = Path(make()).read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("text", b"no zip"), ("empty", b"")):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as an"):
            open_source(str(path)).check()


@pytest.mark.parametrize("header", [b"", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x01\x00\x06\x00{(]})\n", b"\x93NUMPY\x01\x00\x02\x00{}"])
def test_a_broken_header_is_refused(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("train_images.npy", header)
    with pytest.raises(DataError, match="cannot be read as an"):
        open_source(str(tmp_path / "a.npz")).check()


def test_an_array_that_claims_more_than_there_is_is_refused(make, tmp_path):
    with zipfile.ZipFile(make()) as whole, zipfile.ZipFile(tmp_path / "liar.npz", "w") as file:
        file.writestr("train_images.npy", whole.read("train_images.npy")[:-1])
    with pytest.raises(DataError, match="is not the plain array"):
        open_source(str(tmp_path / "liar.npz")).check()


def test_damaged_pixels_are_found_when_they_are_read(make, tmp_path):
    path = Path(make(np.savez, train_images=pictures(0, 30, 64, 64)))
    data = bytearray(path.read_bytes())
    data[5000] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="Bad CRC"):
        device_images(str(path), config("data.devices=1"), 0)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match=r"is no file; a folder of images needs a name that does not end in \.npz"):
        open_source(str(tmp_path / "folder.npz"))
    with pytest.raises(DataError, match="there is no file"):
        open_source(str(tmp_path / "gone.npz"))
