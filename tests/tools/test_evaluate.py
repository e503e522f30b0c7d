"""`lwfed evaluate`, on encoders that a simulated run has left."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import save_file

from lwfed.data import digits
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.tools.cli import main
from lwfed.tools.simulation.command import Simulation, simulate

TINY = (
    "stages.rounds_per_stage=1",
    "train.epochs=1",
    "model={depth: 2, image_size: 16}",
    "data.devices=1",
    "calibration.every=never",
    "evaluation.probe=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    simulate(Simulation("demo", TINY, out, "digits", dropout=0.0, seeds=None, strategies=None, workers=1, device="cpu"))
    return out / "seed-0"


def evaluate(*words, code=0):
    done = CliRunner().invoke(main, ["evaluate", *map(str, words)])
    assert done.exit_code == code, done.output
    return done


def report(*words):
    return json.loads(evaluate(*words, "--json").stdout)


def test_a_file_and_the_run_it_came_from_are_the_same_encoder(run, tmp_path):
    words = ("--data", "digits", "--limit", 150)
    found = report(run / "encoder.safetensors", *words, "--out", tmp_path / "report.json")
    assert found["rows"][0].keys() == {"name", "protocol", "accuracy", "class_accuracy", "precision", "recall", "f1", "seconds"}
    assert [(row["name"], row["protocol"]) for row in found["rows"]] == [
        (name, protocol) for name in ("random", "raw_pixels", "encoder") for protocol in ("knn", "probe")
    ]
    figures = [[row[name] for name in ("accuracy", "f1")] for row in found["rows"]]
    assert [[row[name] for name in ("accuracy", "f1")] for row in report(run, *words)["rows"]] == figures
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == found["rows"]
    assert (found["bank"], found["queries"]) == (150, 150)
    assert (found["encoder"]["strategy"], found["encoder"]["stage"], found["classes"]) == ("layer_wise", 2, 10)
    assert found["features"].keys() == {"random", "encoder"}


def test_without_a_limit_all_images_are_used(run):
    found = report(run, "--data", "digits", "--protocol", "knn")
    assert found["bank"] + found["queries"] == digits.COUNT


def test_the_table_fits_a_terminal(run):
    done = evaluate(run, "--data", "digits", "--protocol", "knn", "--limit", 200)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "200 images to learn labels from, 200 to test" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if "kNN" in line] == ["random", "raw", "encoder"]
    assert "encoder: kNN" in done.stderr


def test_a_test_split_is_tested_on_and_all_else_is_learnt_from(run, tmp_path):
    images, labels = digits.read()
    arrays = {"train_images": images[:300], "train_labels": labels[:300], "test_images": images[300:400], "test_labels": labels[300:400]}
    np.savez(tmp_path / "scans.npz", **arrays)
    found = report(run, "--data", tmp_path / "scans.npz", "--protocol", "knn")
    assert (found["bank"], found["queries"]) == (300, 100)


def test_classes_of_both_splits_are_the_same_by_name(run, tmp_path):
    """Nearest neighbours find the very images again, also where the splits have different classes."""
    images, labels = digits.read()
    train, test = labels < 8, (labels > 2) & (labels < 8)
    np.savez(
        tmp_path / "scans.npz", train_images=images[train], train_labels=labels[train], test_images=images[test], test_labels=labels[test]
    )
    found = report(run, "--data", tmp_path / "scans.npz", "--protocol", "knn", "--neighbours", 1)
    assert [row["accuracy"] for row in found["rows"] if row["name"] == "raw_pixels"] == [1.0]


def test_folders_of_classes_are_halved(run, tmp_path):
    images, labels = digits.read()
    for kind in (3, 8):
        (tmp_path / str(kind)).mkdir()
        for number in np.flatnonzero(labels == kind)[:10]:
            Image.fromarray(images[number]).save(tmp_path / str(kind) / f"{number}.png")
    found = report(run, "--data", tmp_path, "--protocol", "knn", "--neighbours", 1)
    assert (found["classes"], found["bank"], found["queries"], found["neighbours"]) == (2, 10, 10, 1)


def test_fine_tuning_begins_from_the_encoder_and_from_scratch(run):
    import_torchvision()
    words = (run, "--data", "digits", "--protocol", "finetune", "--epochs", 1, "--limit", 60)
    first, second = ([{**row, "seconds": 0} for row in report(*words)["rows"]] for _ in range(2))
    assert first == second
    assert [(row["name"], row["protocol"]) for row in first] == [("random", "finetune"), ("raw_pixels", "probe"), ("encoder", "finetune")]
    losses = [line for line in evaluate(*words, "--epochs", 2).stderr.splitlines() if "loss" in line]  # the last option counts
    assert len(losses) == 4
    assert losses[:2] != losses[2:]


def test_random_weights_are_not_the_encoder_s(run):
    found = report(run, "--data", "digits", "--protocol", "probe", "--limit", 200)
    assert found["features"]["random"] != found["features"]["encoder"]
    assert found["rows"][0]["accuracy"] != found["rows"][2]["accuracy"]


def test_a_few_images_are_not_judged_by(run):
    done = evaluate(run, "--data", "digits", "--protocol", "knn", "--limit", 8)
    assert "collapsed" not in done.stdout
    assert "(--limit 8)" in done.stdout


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\0" * 100])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert "give a file that `cloud-server export` has written" in evaluate(tmp_path / "file", "--data", "digits", code=73).output


def test_what_holds_another_model_is_refused(run, tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    assert "is no encoder of lwfed" in evaluate(tmp_path / "other.safetensors", "--data", "digits", code=73).output


def test_images_without_classes_are_refused(run, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    assert "has no classes" in evaluate(run, "--data", tmp_path, code=66).output


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert "there is no run in" in evaluate(tmp_path, "--data", "digits", code=73).output
    assert "cannot be read" in evaluate(tmp_path / "missing", "--data", "digits", code=73).output
    evaluate(tmp_path, "--data", "digits", "--protocol", "knn,guess", code=2)
