import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lwfed.config import load_config
from lwfed.data.load import auxiliary_images, device_images, labelled_images
from lwfed.tools.cli import main
from lwfed.tools.split import make_split
from lwfed.tools.split_figure import draw_split


@pytest.fixture
def run():
    def run(*arguments, code=0):
        done = CliRunner().invoke(main, ["split", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    return run


def settings(*values):
    return [word for value in values for word in ("--set", value)]


@pytest.fixture
def sites(tmp_path):
    for number in range(12):
        path = tmp_path / "sites" / f"site {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    return str(tmp_path / "sites")


@pytest.mark.parametrize("partition", ["even", "dirichlet", "classes", "quantity"])
def test_the_split_shown_is_the_one_that_is_trained_on(run, partition):
    chosen = (f"data.partition={partition}", "data.classes_per_device=4")
    shown = json.loads(run("demo", "--json", *settings(*chosen)))
    config = load_config("demo", chosen)
    assert [device["images"] for device in shown["devices"]] == [len(device_images("digits", config, number)) for number in range(3)]
    assert shown["auxiliary"]["images"] == len(auxiliary_images(config))
    assert shown["labelled"]["counts"] == np.bincount(labelled_images(config).labels).tolist()
    assert all(sum(device["counts"]) == device["images"] for device in shown["devices"])


def test_a_folder_is_shown_as_shared(run, sites):
    shown = json.loads(run("demo", "--data", sites, "--json", *settings("data.partition=folders", "data.devices=2", "data.min_images=5")))
    assert (shown["data"], shown["classes"]) == ("sites", ["site 0", "site 1", "site 2"])
    assert [device["counts"] for device in shown["devices"]] == [[4, 0, 4], [0, 4, 0]]
    assert [device["remark"] for device in shown["devices"]] == ["few", "unfit"]


def test_the_table_says_what_becomes_of_devices_with_few_images(run, sites):
    text = run("demo", "--data", sites, *settings("data.partition=folders", "data.devices=2", "data.min_images=5"))
    rows = {line.rpartition("  ")[0].split("  ")[0]: line for line in text.splitlines()}
    assert rows["device 0"].split()[2:7] == ["8", "2", "4", "0", "4"]
    assert "fewer than train.batch_size 32" in rows["device 0"]
    assert "not asked to train: fewer than data.min_images 5" in rows["device 1"]


@pytest.mark.parametrize("labels", [None, np.arange(60) % 10, np.arange(60) % 30])
def test_the_picture_has_a_row_for_each_share(run, tmp_path, labels):
    arrays = {"train_images": np.zeros((60, 4, 4), np.uint8), **({} if labels is None else {"train_labels": labels})}
    np.savez(tmp_path / "a.npz", **arrays)

    def height(devices):
        out = tmp_path / f"{devices}.png"
        run("base", "--data", str(tmp_path / "a.npz"), "--out", str(out), *settings(f"data.devices={devices}"))
        with Image.open(out) as image:
            assert image.format == "PNG"
            return image.height

    assert height(7) - height(3) == pytest.approx(4 * 0.28 * 150, abs=2)


def test_the_same_split_is_the_same_picture():
    split = make_split("digits", load_config("demo"))
    first, second = draw_split(split), draw_split(split)
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (23, 190, 207)} <= colours, "the first and the last class"


def test_without_a_set_it_asks_for_one(run, sites):
    assert "say which one devices are given, --data" in run("base", code=78)
    assert "say which one devices are given, --data" in run("base", *settings(f"evaluation.data={sites}"), code=78)


def test_a_picture_that_cannot_be_written_says_so(run, tmp_path):
    assert "choose another --out" in run("demo", "--out", str(tmp_path / "none" / "a.png"), code=73)
