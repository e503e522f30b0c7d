"""Real processes that are killed, over links that break: every run ends, with the bits of one that nothing disturbed."""

import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import psutil
import pytest

from lwfed.cloud_server.broker import find_mosquitto
from lwfed.tools.links.proxy import Link, Proxy

from .conftest import Fleet, digest_of_result, free_port, starting

CHUNK_BYTES, WINDOW = 8192, 4
SMALLER = (
    *(f"transfer.chunk_bytes={CHUNK_BYTES}", f"transfer.window={WINDOW}", "transfer.codec=int8"),
    *("train.epochs=1", "train.batch_size=256", "calibration.every=never", "evaluation.data=null"),
)
FOUR_ROUNDS = (*SMALLER, "model.depth=1", "stages.rounds_per_stage=4")
TWO_STAGES = (*SMALLER, "model.depth=2", "stages.rounds_per_stage=2")
LARGE = (*SMALLER, "transfer.codec=fp32", "model.width=96", "model.depth=1")  # what a cut may cost is a small part of an update then
PLACES = {FOUR_ROUNDS: ((1, 1), (1, 2), (1, 3)), TWO_STAGES: ((1, 1), (1, 2), (2, 1))}  # stage and round, all but the last
PARTIES = ("agent", "server", "broker")
BROKERS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")),
]
CALLS_BYTES = 40_000  # of a new connection: greetings, what is retained, the offer with its memory curve, what was asked before


@dataclass
class Outcome:
    digest: str
    passed: int = 0  # bytes over all links
    cuts: int = 0


def over(link, start, root, settings, seed=0, **options):
    """A whole run with every device behind `link`."""
    port = free_port()
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(("127.0.0.1", port), link, seed + number)) for number in (1, 2)]
        fleet = Fleet(start, root, port, settings=settings, way=lambda number: proxies[number - 1].port, **options)
        server, devices = fleet.begin()
        digest = digest_of_result(server)
        assert server.result() == 0
        for device in devices:
            assert device.end() == 0
        counts = [proxy.counts for proxy in proxies]
    return Outcome(digest, sum(one.up_bytes + one.down_bytes for one in counts), sum(one.cuts for one in counts))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function of settings: the outcome of their run, which is made once."""

    @cache
    def outcome(settings):
        with starting() as start:
            return over(Link(), start, tmp_path_factory.mktemp("undisturbed"), settings)

    return outcome


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
    """The process of the broker that `server` has started."""
    for child in psutil.Process(server.process.pid).children():
        words = child.cmdline()
        if Path(words[0]).name == "mosquitto" or "lwfed.cloud_server.embedded" in words:
            return child
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


SLOW_CUTS = [pytest.param(seed, broker, marks=pytest.mark.slow) for seed in range(10, 30, 2) for broker in ("embedded", "auto")]


@pytest.mark.parametrize(("seed", "broker"), [(0, "embedded"), *SLOW_CUTS])
def test_what_a_cut_costs_is_bounded(start, tmp_path, undisturbed, seed, broker):
    expected = undisturbed(LARGE)
    found = over(Link(cut_every_bytes=400_000), start, tmp_path, LARGE, seed, broker=broker)
    assert found.digest == expected.digest
    assert found.cuts >= 3
    assert found.passed - expected.passed <= found.cuts * (WINDOW * CHUNK_BYTES + CALLS_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "link",
    [Link(rate=50_000, delay_s=0.2), Link(rate=50_000, stall_every_s=20, stall_s=8), Link(rate=50_000, cut_every_s=10)],
    ids=["late", "stalls", "cuts"],
)
def test_slow_late_and_stalling_links_change_no_bit(start, tmp_path, undisturbed, link):
    assert over(link, start, tmp_path, TWO_STAGES).digest == undisturbed(TWO_STAGES).digest


@pytest.fixture
def namespace():
    """A network of its own, in which the loopback has 50 kB/s and drops what does not fit: a command that runs others in it."""
    keeper = subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo up; exec cat"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    with keeper:
        try:
            if not keeper.stdout.readline():
                pytest.skip(f"no network namespaces here: {keeper.stderr.read().strip()}")
            within = ("nsenter", f"--target={keeper.pid}", "--user", "--net", "--preserve-credentials")
            for words in ("ip link set lo mtu 1500 up", "tc qdisc add dev lo root tbf rate 800kbit burst 20kb latency 200ms"):
                made = subprocess.run([*within, *words.split()], capture_output=True, text=True)
                if made.returncode:
                    pytest.skip(f"`{words}` does not work here: {made.stderr.strip()}")
            yield within
        finally:
            keeper.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))), reason="needs unshare, nsenter, ip and tc")
def test_a_network_that_is_gone_for_seconds_changes_no_bit(namespace, start, tmp_path, undisturbed):
    """Nobody is told that a connection broke: packets are lost until the kernel sends them again."""
    server, devices = Fleet(start, tmp_path, free_port(), settings=TWO_STAGES, before=namespace).begin()
    for place in PLACES[TWO_STAGES]:
        server.wait_for("round", stage=place[0], round=place[1])
        subprocess.run([*namespace, "ip", "link", "set", "lo", "down"], check=True)
        time.sleep(4)
        subprocess.run([*namespace, "ip", "link", "set", "lo", "up"], check=True)
    assert digest_of_result(server) == undisturbed(TWO_STAGES).digest
    assert server.result() == 0
    for device in devices:
        assert device.end() == 0
