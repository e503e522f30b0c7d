"""A configuration between programs of different versions."""

import json

import pytest

from lwfed.config import RunConfig, load_config
from lwfed.errors import ConfigError

BASE = load_config("base")


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
