import gzip
import os
import struct
import subprocess
import sys
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lwfed.config import load_config
from lwfed.data import downloads, open_source, torchvision_sets
from lwfed.data.division import divide
from lwfed.data.kept import KeptPixels
from lwfed.data.load import auxiliary_images, device_images, labelled_images
from lwfed.errors import DataError, MissingDependency


def config(*settings):
    return load_config("demo", ["data.min_images=2", *settings])


def paint(path, colour=(200, 100, 50), size=(20, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("b.png", "a.PNG", "deep/er/c.png"):
        paint(root / name)
    (root / "notes.txt").write_text("no image")
    paint(root / ".hidden.png")
    return root


def test_a_folder_is_read_recursively_in_sorted_order_and_hidden_files_stay_out(folder):
    paint(folder / "b.png", colour=(0, 0, 255))
    found = device_images(str(folder), config(), 0)
    assert found.pixels.shape == (3, 3, 16, 16)
    assert found.pixels[:, :, 0, 0].tolist() == [[200, 100, 50], [0, 0, 255], [200, 100, 50]]
    assert found.labels is None


def test_grey_models_get_one_channel(folder):
    assert device_images(str(folder), config("model.channels=1"), 0).pixels.shape == (3, 1, 16, 16)


def test_sub_folders_are_classes_where_all_images_lie_in_one(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "cat/more/3.png"):
        paint(tmp_path / name)
    found = labelled_images(config(f"evaluation.data={tmp_path}"))
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1]


def test_evaluation_needs_classes(folder):
    with pytest.raises(DataError, match="own sub-folder"):
        labelled_images(config(f"evaluation.data={folder}"))


@pytest.mark.parametrize("kept", [True, False])
def test_broken_files_are_skipped_and_counted(folder, tmp_path, kept):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.gif").write_bytes(b"")
    os.symlink(folder / "gone", folder / "dangling.png")
    found = device_images(str(folder), config(), 0, tmp_path / "kept" if kept else None)
    assert (len(found), found.skipped) == (3, 4)


def test_a_decompression_bomb_is_skipped(folder):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "bomb.png").write_bytes(bomb)
    assert device_images(str(folder), config(), 0).skipped == 1


def test_links_are_followed_and_loops_end(folder, tmp_path):
    os.symlink(folder, folder / "deep" / "loop")
    paint(tmp_path / "elsewhere" / "d.png")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    assert open_source(str(folder)).check() == 4


def test_exif_orientation_is_respected(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # the stored top is white
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.png")
    turned, plain = device_images(str(tmp_path), config(), 0).pixels
    assert plain[0, 0, 0] == 255
    assert turned[0, 0, 0] == 0


def test_16_bit_grey_and_transparent_palettes_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((8, 8), 128 << 8, np.uint16)).save(tmp_path / "a.png")
    paint(tmp_path / "b.png", colour=7, mode="P", transparency=b"\x80" * 8)
    assert device_images(str(tmp_path), config(), 0).pixels[0, 0, 0, 0] == 128


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no folder"),
        (lambda path: path.mkdir(), "no images in"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: [path.mkdir(), (path / "a.png").write_text("x")], "can be read"),
    ],
)
def test_a_source_without_images_says_what_to_do(tmp_path, make, message):
    make(tmp_path / "place")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "place")).check()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is empty"),
        ("~nosuchuser/x", "no folder"),
        ("n" * 300, "File name too long"),
        ("a\0b", "null byte"),
        ("{}/file/below", "no folder"),
    ],
)
def test_a_name_that_cannot_be_a_folder_is_refused(tmp_path, spec, message):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=message):
        open_source(spec.format(tmp_path))


def test_a_folder_behind_one_that_may_not_be_entered_is_refused(monkeypatch, tmp_path):
    def stat(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)  # root may enter any
    with pytest.raises(DataError, match=r"Permission denied.*permissions"):
        open_source(str(tmp_path))


def test_a_set_without_its_package_is_found_before_training(monkeypatch):
    monkeypatch.setattr("lwfed.data.source.find_spec", lambda name: None, raising=False)
    with pytest.raises(MissingDependency, match="torchvision"):
        open_source("cifar10").check()


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(DataError, match="did you mean the data set 'cifar10'"):
        open_source("cifar-10")


def test_too_few_images_are_refused_with_the_number(folder):
    with pytest.raises(DataError, match="3 readable images"):
        device_images(str(folder), config("data.min_images=4"), 0)


def test_decoded_images_are_kept_until_a_file_changes(folder, tmp_path):
    kept, calls = tmp_path / "kept", []

    def decode():
        calls.clear()
        return device_images(str(folder), config(), 0, kept, lambda done, total: calls.append((done, total)))

    first = decode()
    assert calls == [(1, 3), (2, 3), (3, 3)]
    again = decode()
    assert not calls
    assert isinstance(again.pixels, KeptPixels)
    assert np.array_equal(first.pixels, again.pixels)
    again.pixels[:1][0] = 0  # writable, as torch wants, and nobody else's
    paint(folder / "b.png", colour=(1, 2, 3), size=(9, 9))
    changed = decode()
    assert len(calls) == 3
    assert changed.pixels[:][1, :, 0, 0].tolist() == [1, 2, 3]
    assert changed.pixels[:][0, 0, 0, 0] == 200
    assert len(list(kept.iterdir())) == 2, "the old images went"


def test_kept_images_that_a_power_cut_emptied_are_decoded_again(folder, tmp_path):
    first = device_images(str(folder), config(), 0, tmp_path / "kept")
    next((tmp_path / "kept").glob("*.npy")).write_bytes(b"")
    assert len(device_images(str(folder), config(), 0, tmp_path / "kept")) == len(first)


@pytest.mark.parametrize("spec", ["digits", "folder"])
def test_every_call_gives_the_same_kind_of_thing(folder, tmp_path, spec):
    source = str(folder) if spec == "folder" else spec
    first, later = (device_images(source, config(), 1, tmp_path / "kept") for _ in range(2))
    assert isinstance(first.pixels, KeptPixels)
    assert type(first.pixels) is type(later.pixels)
    assert np.array_equal(first.pixels, later.pixels)
    assert first.labels is later.labels is None
    assert first.classes == later.classes


def test_digits_are_split_without_overlap_and_cover_everything(tmp_path):
    settings = config()
    parts = [device_images("digits", settings, number, tmp_path) for number in range(3)]
    parts += [auxiliary_images(settings), labelled_images(settings)]
    assert sum(map(len, parts)) == 1797
    assert parts[0].pixels[:].max() == 255
    again = device_images("digits", settings, 2, tmp_path)
    assert np.array_equal(again.pixels, device_images("digits", settings, 2).pixels)


@pytest.fixture
def sites(tmp_path):
    """Five sub-folders of four images each; the colour says in which one an image lies."""
    for site in range(5):
        for number in range(4):
            paint(tmp_path / "sites" / f"site{site}" / f"{number}.png", colour=(50 * site, number, 0))
    return str(tmp_path / "sites")


def shares(spec, *settings, kept=None):
    found = config("evaluation.data=null", "calibration.every=never", *settings)
    return [device_images(spec, found, number, kept, shared=True).pixels[:][:, :2, 0, 0].tolist() for number in range(found.data.devices)]


@pytest.mark.parametrize("partition", ["even", "dirichlet", "classes", "quantity", "folders"])
def test_a_shared_folder_is_divided(sites, partition):
    found = shares(sites, f"data.partition={partition}", "data.dirichlet_beta=100")
    assert sorted(chain(*found)) == [[50 * site, number] for site in range(5) for number in range(4)]
    assert len(device_images(sites, config("evaluation.data=null"), 7)) == 20, "and used whole by a device of its own"


def test_sub_folders_are_dealt_in_turn(sites, tmp_path):
    found = [shares(sites, "data.partition=folders", kept=tmp_path / "kept") for _ in range(2)]
    assert [sorted({red // 50 for red, _ in share}) for share in found[0]] == [[0, 3], [1, 4], [2]]
    assert found[0] == found[1]


def test_a_device_without_a_sub_folder_has_too_few_images(sites):
    settings = config("evaluation.data=null", "data.partition=folders", "data.devices=6")
    with pytest.raises(DataError, match="0 readable images in device 5's share of"):
        device_images(sites, settings, 5, shared=True)


def test_images_outside_of_sub_folders_cannot_be_dealt_by_them(sites):
    paint(Path(sites) / "loose.png")
    with pytest.raises(DataError, match="images lie outside of any: use even or quantity"):
        shares(sites, "data.partition=folders")
    assert sum(map(len, shares(sites, "data.partition=even"))) == 21


@pytest.mark.parametrize("key", ["evaluation.data", "calibration.data"])
def test_a_shared_folder_is_not_the_server_s_too(sites, key):
    with pytest.raises(DataError, match=f"{key} .* that the devices share have images in common"):
        device_images(sites, config("evaluation.data=null", f"{key}={sites}/../sites"), 0, shared=True)


def test_an_empty_share_of_a_set_is_refused_with_its_number(tmp_path):
    settings = config("data.partition=dirichlet", "data.dirichlet_beta=1e-4", "data.devices=30")
    number = [len(rows) for rows in divide(open_source("digits"), settings).shares.devices].index(0)
    with pytest.raises(DataError, match=f"0 readable images in device {number}'s share of 'digits'"):
        device_images("digits", settings, number, tmp_path)


def test_a_device_beyond_the_shares_is_told_what_to_do():
    with pytest.raises(DataError, match=r"device number 4.*larger data\.devices"):
        device_images("digits", config(), 3)


def test_digits_do_not_import_scikit_learn_nor_a_folder_torch(folder):
    script = (
        "import sys; from lwfed.config import load_config; from lwfed.data.load import device_images as d;"
        f"c = load_config('demo', ['data.min_images=2']); d('digits', c, 0); d({str(folder)!r}, c, 0);"
        "print([m for m in ('sklearn', 'torch', 'torchvision') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_cheap_check_needs_neither_numpy_nor_pillow_for_sets_and_no_numpy_for_folders(folder):
    script = (
        "import sys; from lwfed.data import open_source as o; o('digits').check();"
        f"print('PIL' in sys.modules); o({str(folder)!r}).check(); print('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\nFalse\n"


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """FashionMNIST's files as its authors publish them, with other pictures."""
    pytest.importorskip("torch")
    from lwfed.data import digits

    images, labels = digits.read()
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, rows in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        for kind, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows].astype(np.uint8))):
            magic = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            with gzip.open(raw / f"{prefix}-{kind}-ubyte.gz", "wb") as file:
                file.write(magic + array.tobytes())
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(magic + array.tobytes())
    monkeypatch.setenv("LWFED_DATASETS", str(tmp_path))


@pytest.mark.usefixtures("fashion")
def test_torchvision_sets_keep_their_test_split_for_evaluation():
    settings = config("evaluation.data=fashion-mnist", "calibration.data=fashion-mnist", "data.partition=even")
    assert len(labelled_images(settings)) == 100
    assert len(auxiliary_images(settings)) == 45
    assert [len(device_images("fashion-mnist", settings, number)) for number in range(3)] == [85, 85, 85]


@pytest.mark.usefixtures("fashion")
def test_a_set_that_is_not_whole_is_found_before_training_with_what_to_do(tmp_path):
    assert open_source("fashion-mnist").check() is None
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    for name in ("fashion-mnist", "cifar10"):
        with pytest.raises(DataError, match=rf"`lwfed fetch {name}`.*LWFED_DATASETS.*a folder of images"):
            open_source(name).check()
        with pytest.raises(DataError, match=rf"`lwfed fetch {name}`"):
            device_images(name, config(), 0)


@pytest.mark.usefixtures("fashion")
def test_a_set_is_fetched_where_it_is_looked_for(monkeypatch, tmp_path):
    def download(dataset):
        folder = tmp_path / dataset.base_folder
        folder.mkdir()
        for name, _ in (*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], "")):
            (folder / name).touch()
        raise RuntimeError("Dataset not found or corrupted")  # as for any files but the real ones

    monkeypatch.setattr(torchvision_sets.import_torchvision().datasets.CIFAR10, "download", download)
    with pytest.raises(DataError, match=r"corrupted.*put its files into .*cifar-10-batches-py by hand"):
        torchvision_sets.fetch("cifar10")
    assert open_source("cifar10").check() is None  # the names of the files are those that torchvision has


@pytest.mark.parametrize("name", downloads.NAMES)
def test_the_files_that_are_looked_for_are_those_that_torchvision_reads(name, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("LWFED_DATASETS", str(tmp_path))
    kind = getattr(torchvision_sets.import_torchvision().datasets, torchvision_sets.CLASSES[name])
    if name.startswith("cifar"):
        read = {file for file, _ in (*kind.train_list, *kind.test_list)} | {kind.meta["filename"]}
        assert (downloads.folder(name), set(downloads.FILES[name][1])) == (tmp_path / kind.base_folder, read)
    else:
        read = {Path(file).stem for file, _ in kind.resources}
        assert (downloads.folder(name), set(downloads.FILES[name][1])) == (tmp_path / kind.__name__ / "raw", read)


def test_a_float_image_is_skipped_not_guessed(folder):
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "b.tif")
    assert device_images(str(folder), config(), 0).skipped == 1
