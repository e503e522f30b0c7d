"""Links that break, stall and are late, and a network that is gone: every run ends, with the bits of one that nothing disturbed."""

import shutil
import subprocess
import time

import pytest

from lwfed.tools.links.proxy import Link

from .conftest import FEW_IMAGES, Fleet, digest_of_result, free_port
from .runs import CHUNK_BYTES, PLACES, SMALLER, TWO_STAGES, WINDOW, over

# What a cut may cost is a small part of an update then.
LARGE = (*SMALLER, *FEW_IMAGES, "transfer.codec=fp32", "model.width=96", "model.depth=1")
CALLS_BYTES = 40_000  # of a new connection: greetings, what is retained, the offer with its memory curve, what was asked before
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
    """A network of its own, in which the loopback has 100 kB/s and drops what does not fit: a command that runs others in it."""
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
    for place in PLACES:
        server.wait_for("round", stage=place[0], round=place[1])
        subprocess.run([*namespace, "ip", "link", "set", "lo", "down"], check=True)
        time.sleep(4)
        subprocess.run([*namespace, "ip", "link", "set", "lo", "up"], check=True)
    assert digest_of_result(server) == undisturbed(TWO_STAGES).digest
    assert server.result() == 0
    for device in devices:
        assert device.end() == 0
