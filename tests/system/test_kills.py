"""Real processes that are killed: every run ends, with the bits of one that nothing disturbed."""

import signal
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil
import pytest

from lwfed.cloud_server.broker import find_mosquitto

from .conftest import digest_of_result
from .runs import FOUR_ROUNDS, PLACES, TWO_STAGES

RESTART_S = 30.0
PARTIES = ("agent", "server", "broker")
BROKERS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")),
]


def kill(party, random, fleet, server, devices):
    """SIGKILL for one of them and a new start, which for the broker is the server's work; the server."""
    assert server.process.poll() is None, "the run ended before the kill"
    if party == "agent":
        number = random.randrange(2)
        devices[number].end(signal.SIGKILL)
        devices[number] = fleet.device(number + 1)
    elif party == "broker":
        broker_of(server).kill()
    else:
        server.end(signal.SIGKILL)
        return fleet.server()
    return server


def broker_of(server):
    """The process of the broker that `server` has started, in place of one that was killed a moment ago too."""
    until = time.monotonic() + RESTART_S
    while time.monotonic() < until:
        for child in psutil.Process(server.process.pid).children():
            with suppress(psutil.Error):  # it has just ended
                words = child.cmdline()
                if Path(words[0]).name == "mosquitto" or "lwfed.cloud_server.embedded" in words:
                    return child
        time.sleep(0.05)
    pytest.fail("the server has no broker")


def disturbed(fleet, settings, broker, seed, times):
    """Digest of a run in which each party is killed so often, at moments drawn from `seed`."""
    fleet, random = fleet(broker=broker, settings=settings), Random(seed)
    places = sorted(random.choice(PLACES[settings]) for _ in PARTIES * times)
    parties = random.sample(PARTIES * times, len(PARTIES) * times)
    server, devices = fleet.begin()
    reached = (1, 1)
    for place, party in zip(places, parties, strict=True):
        while reached < place:
            said = server.wait_for("round")
            reached = (said["stage"], said["round"])
        time.sleep(random.uniform(0, 0.7))  # a moment within a round
        server = kill(party, random, fleet, server, devices)
        if party == "server":
            server.wait_for("run", status="resumed")
    digest = digest_of_result(server)
    assert server.result() == 0
    for device in devices:
        assert device.end() == 0
    return digest


@pytest.mark.parametrize("broker", BROKERS)
def test_killed_agents_servers_and_brokers_change_no_bit_of_the_result(fleet, undisturbed, broker):
    assert disturbed(fleet, FOUR_ROUNDS, broker, seed=0, times=1) == undisturbed(FOUR_ROUNDS).digest


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_kills_at_random_points_change_no_bit_of_the_result(fleet, undisturbed, seed, broker):
    assert disturbed(fleet, TWO_STAGES, broker, seed, times=2) == undisturbed(TWO_STAGES).digest
