"""The device's own previous update, which alignment by moon compares with: kept across deaths of the process."""

import shutil

import pytest

from lwfed import disk
from lwfed.config import load_config
from lwfed.edge_agent.previous import Previous, Turn, forget
from lwfed.edge_agent.worker import Worker
from lwfed.models.initial import init_parts
from lwfed.plan import by_part
from lwfed.wire import tensors as wire

SMALL = [
    "model={image_size: 8, width: 8, heads: 2}", "ssl={hidden_dim: 8, output_dim: 8}", "train={epochs: 1, batch_size: 8}",
    "data={partition: even, devices: 60}",
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("unmeasured", "one_thread")


class Device:
    """A folder, and training processes that begin anew with every order."""

    def __init__(self, root, method="moon", codec="fp32", *settings):
        self.config = load_config("demo", [*SMALL, f"alignment.method={method}", f"transfer.codec={codec}", *settings])
        self.root, self.kept, self.warned = root, root / "kept", []
        self.kept.mkdir(parents=True, exist_ok=True)
        (root / "config").write_bytes(self.config.to_bytes())

    def train(self, round, stage=1, participant=0, worker=None, after=0):
        """`after` the round before, if no other is given."""
        parts = {}
        # What the server sends differs from round to round.
        sent = init_parts(load_config("demo", [*SMALL, f"run.seed={round}"]), self.config.plan(stage).present)
        for part, held in by_part(sent).items():
            parts[part] = str(self.root / part)
            (self.root / part).write_bytes(wire.encode({name: tensor.numpy() for name, tensor in held.items()}))
        place = {
            "stage": stage,
            "round": round,
            "participant": participant,
            "after": (round - 1 or None) if after == 0 else after,
            "lr_scale": 1.0,
            "shared": False,
            "graphs": {},
            "execution": None,
            "budget_mb": None,
        }
        files = {"config": str(self.root / "config"), "kept": str(self.kept), "out": str(self.root / "update")}
        (worker or Worker()).handle({"do": "train", "parts": parts, "data": "digits", **place, **files}, self.hear)
        return (self.root / "update").read_bytes()

    def hear(self, said):
        if said["event"] == "warning":
            self.warned.append(said["text"])

    def names(self):
        return sorted(path.name.partition("-0-")[2] for path in self.kept.glob("previous-*"))


@pytest.mark.parametrize(("method", "codec"), [("moon", "fp32"), ("off", "int8")])
def test_a_killed_process_changes_no_bit(tmp_path, method, codec):
    """Neither with what alignment compares with nor with what an encoding has lost."""
    whole, cut = Device(tmp_path / "whole", method, codec), Device(tmp_path / "cut", method, codec)
    worker = Worker()
    expected = [whole.train(round, worker=worker) for round in (1, 2, 3)]
    found = [cut.train(1), cut.train(2)]
    assert cut.train(2) == found[1], "a repeated round"
    found.append(cut.train(3))
    assert cut.train(3) == found[2]
    assert found == expected
    shutil.rmtree(cut.kept)
    assert cut.train(3) != expected[2], "what was kept counts"


@pytest.mark.parametrize(("method", "codec"), [("moon", "fp32"), ("off", "int8")])
def test_an_update_that_was_not_taken_counts_for_nothing(tmp_path, method, codec):
    """Of a round that had enough without it, or that was over before it was handed over."""
    one, other = Device(tmp_path / "one", method, codec), Device(tmp_path / "other", method, codec)
    for device in (one, other):
        device.train(1)
    one.train(2)
    one.train(3, after=1)
    found = one.train(4, after=1)
    assert other.train(4, after=1) == found
    assert one.train(4, after=1) == found, "a repeated round"
    assert one.train(4, after=None) != found


@pytest.mark.parametrize(("method", "codec"), [("moon", "fp32"), ("off", "int8")])
def test_a_run_that_goes_on_with_another_deadline_goes_on_from_what_was_kept(tmp_path, method, codec):
    whole, changed = Device(tmp_path / "whole", method, codec), Device(tmp_path / "changed", method, codec)
    for device in (whole, changed):
        device.train(1)
    changed = Device(changed.root, method, codec, "rounds.deadline_s=7200", "transfer.window=2", "worker.linger_s=1")
    assert changed.train(2) == whole.train(2)
    assert changed.warned == []


def test_a_round_is_compared_with_the_last_earlier_one_of_its_stage(tmp_path):
    device = Device(tmp_path / "one")
    device.train(1)
    compared = device.train(4, after=1)  # the device was not chosen in between
    assert device.names() == ["1-1.safetensors", "1-4.safetensors"]
    forget("previous", device.kept)
    assert device.names() == []
    assert device.train(4) != compared
    alone = Device(tmp_path / "another").train(1, stage=2)
    assert device.train(1, stage=2) == alone, "another stage begins without"
    assert device.names() == ["2-1.safetensors"]


def test_what_two_rounds_need_is_kept_and_no_more(tmp_path):
    device = Device(tmp_path / "one")
    for round in (1, 2, 3):
        device.train(round)
    assert device.names() == ["1-2.safetensors", "1-3.safetensors"]
    (device.kept / "previous-torn.part").touch()
    (device.kept / "another.npy").touch()
    device.train(4)
    assert device.names() == ["1-3.safetensors", "1-4.safetensors"]
    assert (device.kept / "another.npy").exists()


def test_a_stage_that_is_repeated_compares_with_nothing_of_the_attempt_that_collapsed(tmp_path):
    device = Device(tmp_path / "one")
    planned = device.config.round_counts[0]
    device.train(planned)
    assert Previous("previous", device.kept, device.config, Turn(1, planned + 1, 0, planned)).before is None
    device.train(planned + 1)
    assert Previous("previous", device.kept, device.config, Turn(1, planned + 2, 0, planned + 1)).before.exists()


@pytest.mark.parametrize(("kind", "method", "codec"), [("previous", "moon", "fp32"), ("residual", "off", "int8")])
@pytest.mark.parametrize("how", ["spoilt", "gone"])
def test_a_file_that_cannot_be_read_is_as_none_and_said(tmp_path, kind, method, codec, how):
    device = Device(tmp_path / "one", method, codec)
    first = device.train(2, after=None)
    device.train(1)
    path = Previous(kind, device.kept, device.config, Turn(1, 2, 0, 1)).before
    if how == "spoilt":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    assert device.warned == []
    assert device.train(2) == first
    (text,) = device.warned
    assert text.startswith(f"{path.name}, kept of an earlier round, cannot be read (")


@pytest.mark.parametrize("method", ["off", "cosine"])
def test_nothing_is_kept_without_moon(tmp_path, method):
    device = Device(tmp_path / "one")
    device.train(1)
    plain = Device(tmp_path / "one", method)
    first = plain.train(1)
    assert plain.names() == []
    plain.train(2)
    shutil.rmtree(plain.kept)
    assert plain.train(1) == first


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        disk.write(tmp_path / "update.safetensors", b"update")
    assert not list(tmp_path.iterdir())
