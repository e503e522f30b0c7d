"""Real processes that are killed: every run ends, with the bits of one that nothing disturbed."""

import re
import signal
from dataclasses import replace
from itertools import product
from random import Random

import pytest

from lwfed.cloud_server.broker import find_mosquitto

from .conftest import digest_of_result
from .moments import PHASES, Moment, Watch

BROKERS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")),
]
EPOCHS, RUNS = 3, 10
WHOLE = (  # calibrated after each round, evaluated at each stage's end
    *("transfer.chunk_bytes=1024", "transfer.window=2", "transfer.codec=int8", f"train.epochs={EPOCHS}", "train.batch_size=128"),
    *("rounds.quorum=1.0", "rounds.deadline_s=2"),
)
ONE_STAGE = (*WHOLE, "model.depth=1", "stages.rounds_per_stage=2", "train.epochs=2", "calibration.epochs=1")
TWO_STAGES = (*WHOLE, "model.depth=2", "stages.rounds_per_stage=2")

BEGINS, ALL, ENDS, LAST = ((1, 1), (2, 1)), tuple(product((1, 2), (1, 2))), ((1, 2), (2, 2)), ((2, 2),)
OF_SERVER = {"preparing": BEGINS, "measuring": ((1, 1),), "calibrating": ALL, "evaluating": ENDS}
WRITTEN = {"prepared": BEGINS, "calibrated": ALL, "aggregating": ALL, "exporting": LAST}
ON_THE_WAY = {"fetching": ALL, "sending": ALL}
PLACES = {  # party -> phase -> stages and rounds, of TWO_STAGES
    "agent": {**ON_THE_WAY, "training": ALL},
    "agent's worker": {"starting": BEGINS},
    "server": {**OF_SERVER, **WRITTEN, **ON_THE_WAY},
    "server's worker": {**OF_SERVER, "aggregating": ALL},
    "broker": ON_THE_WAY,
}

JOBS = {"preparing": "prepare", "measuring": "evaluate", "aggregating": "aggregate", "calibrating": "calibrate", "evaluating": "evaluate"}


def disturbed(fleet, settings, broker, moments):
    """Digest of a run in which those are killed; agents and the server are started again, the others by who started them."""
    fleet = fleet(broker=broker, settings=settings)
    watch = Watch(fleet.root, fleet.server())
    servers = [watch.server]
    for moment in sorted(moments, key=lambda moment: moment.order):
        if not moment.early and not watch.devices:
            watch.devices = fleet.join(watch.server)
        watch.strike(moment)
        if moment.party == "agent":
            assert watch.devices[moment.device].end() == -signal.SIGKILL
            watch.devices[moment.device] = fleet.device(moment.device + 1)
            look_back(watch.devices[moment.device], moment)
        elif moment.party == "server":
            assert watch.server.end() == -signal.SIGKILL
            watch.server = fleet.server()
            servers.append(watch.server)
            look_back(watch.server, moment)
        elif moment.party == "server's worker":
            look_back(watch.server, moment)
    digest = digest_of_result(watch.server)
    finish(watch)
    assert count_of_tries_again(servers) == sum(moment.party == "server's worker" for moment in moments)
    return digest


def look_back(again, moment):
    """What it says when it begins again, or its worker does, names the place where that was killed."""
    stage, round = moment.place
    if moment.party == "server's worker":
        said = f"the server could not {JOBS[moment.phase]}: the worker process ended by SIGKILL"
        while said not in again.wait_for("warning")["text"]:
            pass  # others are about devices
    elif moment.party == "agent":
        event, said = ("update", "is waiting to be") if moment.phase == "sending" else ("warning", "was interrupted")
        assert re.search(rf"stage {stage}, round {round} {said}", again.wait_for(event)["text"])
    elif moment.phase == "exporting":
        again.wait_for("run", status="finished")
    else:
        phase = PHASES[moment.phase].replace("measuring", "evaluating")
        said = rf"goes on at stage {stage} of \d, round {round} of \d, {phase} \("
        assert re.search(said, again.wait_for("run", status="resumed")["text"])


def count_of_tries_again(servers):
    return sum("; it tries again" in warning["text"] for server in servers for warning in server.all_said("warning"))


def finish(watch):
    """The programs that the watch knows by now lived until their own end."""
    assert watch.server.result() == 0
    for device in watch.devices:
        assert device.process.poll() is None, device.transcript()
        assert device.end() == 0


def drawn(random, moment):
    """The same phase, at another point within it where it takes a while."""
    chosen = replace(moment, device=random.randrange(2), epoch=random.randrange(1, EPOCHS))
    look = random.randint(1, 5) if moment.phase in OF_SERVER else 1
    soon_over = moment.phase == "preparing" and moment.place != (1, 1)  # a warm worker does that in milliseconds
    return chosen if soon_over else replace(chosen, look=look)


def dealt():
    """Every party in all its phases and places, each in one of the runs."""
    random, runs = Random(0), [[] for _ in range(RUNS)]
    moments = [Moment(party, phase, place) for party, phases in PLACES.items() for phase, places in phases.items() for place in places]
    for moment in random.sample(moments, len(moments)):
        free = [run for run in runs if moment.order not in {other.order for other in run}]
        min(free, key=len).append(drawn(random, moment))
    return runs


FEW = {  # what differs between brokers is of the server alone: each sees to some of it
    "embedded": (
        Moment("agent", "training", (1, 1)),
        Moment("broker", "sending", (1, 1)),
        Moment("server", "calibrating", (1, 2)),
        Moment("server", "exporting", (1, 2)),
    ),
    "mosquitto": (
        Moment("agent's worker", "starting", (1, 1)),
        Moment("broker", "fetching", (1, 2)),
        Moment("agent", "sending", (1, 2)),
        Moment("server", "evaluating", (1, 2)),
    ),
}


@pytest.mark.parametrize("broker", BROKERS)
def test_killed_agents_servers_and_brokers_change_no_bit_of_the_result(fleet, undisturbed, broker):
    assert disturbed(fleet, ONE_STAGE, broker, FEW[broker]) == undisturbed(ONE_STAGE).digest


@pytest.mark.slow
def test_a_worker_that_is_killed_in_training_begins_again_with_the_same_bits(fleet, undisturbed):
    moments = [Moment("agent's worker", "training", place) for place in ((1, 1), (1, 2))]
    assert disturbed(fleet, ONE_STAGE, "embedded", moments) == undisturbed(ONE_STAGE).digest


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("run", range(RUNS))
def test_kills_at_every_point_change_no_bit_of_the_result(fleet, undisturbed, run, broker):
    assert disturbed(fleet, TWO_STAGES, broker, dealt()[run]) == undisturbed(TWO_STAGES).digest
