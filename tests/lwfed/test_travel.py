"""A configuration between programs of different versions."""

import hashlib
import json

import pytest

from lwfed.config import RunConfig, learning, load_config, travel
from lwfed.config.explain import keys
from lwfed.config.learning import learning_digest, learns
from lwfed.errors import ConfigError

BASE = load_config("base")


def sent(config):
    return json.loads(config.to_bytes())


def without(config, *names):
    data = config.model_dump(mode="json")
    for section, _, name in (key.partition(".") for key in names):
        del data[section][name]
    return json.dumps(data).encode()


def test_keys_that_an_older_program_did_not_send_are_as_in_base():
    config = load_config("demo", ["train.features_mb=7", "rounds.quorum=0.9", "alignment.method=moon"])
    data = json.loads(without(config, "train.features_mb", "rounds.quorum"))
    del data["alignment"]
    found = RunConfig.from_bytes(json.dumps(data).encode())
    assert (found.train.features_mb, found.rounds.quorum, found.alignment) == (BASE.train.features_mb, BASE.rounds.quorum, BASE.alignment)
    train = config.train.model_copy(update={"features_mb": BASE.train.features_mb})
    assert (found.train, found.views, found.run) == (train, config.views, config.run)


@pytest.mark.parametrize("later", [("train.features_mb",), ("train.features_mb", "views.blur")])
def test_a_later_key_is_left_out_where_it_has_base_s_value(monkeypatch, later):
    config = load_config("demo", [f"train.features_mb={BASE.train.features_mb}", f"views.blur={list(BASE.views.blur)}"])
    before = without(config, *later)
    monkeypatch.setattr(travel, "LATER", later)
    assert sent(config) == json.loads(before)  # as a program wrote it that did not have the keys
    assert config.digest == hashlib.sha256(config.to_bytes()).hexdigest()
    assert RunConfig.from_bytes(config.to_bytes()) == config == RunConfig.from_bytes(before)
    assert RunConfig.from_bytes(before).to_bytes() == config.to_bytes()


def test_a_later_key_with_another_value_is_sent(monkeypatch):
    config = load_config("demo", ["train.features_mb=7"])
    whole = config.to_bytes()
    monkeypatch.setattr(travel, "LATER", ("train.features_mb",))
    assert config.to_bytes() == whole
    assert RunConfig.from_bytes(whole) == config


def test_a_section_of_later_keys_alone_is_left_out_whole(monkeypatch):
    monkeypatch.setattr(travel, "LATER", tuple(key for key in keys(RunConfig) if key.startswith("alignment.")))
    assert sent(BASE).keys() == RunConfig.model_fields.keys() - {"alignment"}
    assert RunConfig.from_bytes(BASE.to_bytes()) == BASE


def test_what_a_device_has_kept_is_of_the_same_run_after_an_upgrade(monkeypatch):
    def named(*settings):
        learning_digest.cache_clear()
        return learning_digest(load_config("base", settings))

    monkeypatch.setattr(travel, "LATER", ("train.features_mb",))
    same, other = named(), named("train.features_mb=7")
    monkeypatch.setattr(learning, "learns", lambda key: key != "train.features_mb" and learns(key))  # as if there were no such key
    monkeypatch.setattr(travel, "LATER", ())
    assert same == named("train.features_mb=7") != other
    learning_digest.cache_clear()


def test_keys_that_came_later_exist():
    assert set(travel.LATER) <= set(keys(RunConfig))


def test_unknown_keys_mean_that_this_program_is_the_older_one():
    data = BASE.model_dump(mode="json")
    data["train"] |= {"brand_new": 1, "lr": "bad"}
    with pytest.raises(ConfigError, match=r"^this lwfed does not know train\.brand_new, so it is older than the server's: upgrade it"):
        RunConfig.from_bytes(json.dumps(data).encode())
    many = {**BASE.model_dump(mode="json"), **{f"new{number}": {} for number in range(99)}}
    with pytest.raises(ConfigError, match=r"new0, .*, new9 and 89 more, so") as caught:
        RunConfig.from_bytes(json.dumps(many).encode())
    assert len(str(caught.value)) < 300


def test_a_value_that_is_not_known_says_nothing_of_who_is_older():
    data = BASE.model_dump(mode="json")
    data["train"]["precision"] = "fp4"
    with pytest.raises(ConfigError, match=r"1 problem\n  train\.precision: must be .*fp4.*\n.*different versions, upgrade the older"):
        RunConfig.from_bytes(json.dumps(data).encode())
