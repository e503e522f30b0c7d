"""Tasks under configurations of servers of other versions."""

import json
import re
from pathlib import Path

import pytest

from lwfed.config import RunConfig, load_config
from lwfed.wire.messages import Fail

from .conftest import CONFIG


def assigned(world, change):
    """Server and device with a task under a configuration that `change` made another of; the changed one is JSON."""
    data = CONFIG.model_dump(mode="json")
    change(data)
    server, device = world.joined()
    server.config = server.store.put(json.dumps(data).encode())
    server.announce()
    server.assign(device.id)
    world.settle(2)
    return server, device


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["train"].update(brand_new=1), r"know train\.brand_new, so it is older .*: upgrade it \(`pip install"),
        (lambda data: data.update(sleep={"brand_new": 1}, train=1), r"know sleep, so it is older than the server's: upgrade it"),
        (lambda data: data["train"].update(precision="fp4"), r"train\.precision: must be .*\n.* of different versions, upgrade the older"),
    ],
)
def test_a_configuration_of_a_newer_server_fails_the_task_not_the_agent_and_says_which_is_older(world, change, says):
    server, device = assigned(world, change)
    (fail,) = server.of(Fail)
    assert (fail.code, device.exit, device.worker) == ("config", None, [])
    assert re.search(says, fail.reason)


def test_a_configuration_of_an_older_server_is_obeyed(world):
    server, device = assigned(world, lambda data: data["train"].pop("batch_size"))
    device.ready()
    world.settle()
    order = device.worker[-1].order
    assert (server.of(Fail), order["do"]) == ([], "train")
    found = RunConfig.from_bytes(Path(order["config"]).read_bytes())
    assert found.train.batch_size == load_config("base").train.batch_size != CONFIG.train.batch_size
    assert found.model_copy(update={"train": CONFIG.train}) == CONFIG
