"""Training processes shared by simulated devices, with processes that do nothing by themselves."""

import pytest

from lwfed.config import load_config
from lwfed.edge_agent.events import WorkerDone, WorkerReady
from lwfed.tools.simulation import pool as pools
from lwfed.tools.simulation.pool import Pool
from lwfed.wire.report import Memory

MEMORY = Memory(baseline_mb=200, peak_mb=300, peak_source="VmHWM", curve=())
DONE = WorkerDone(file="update", images=9, skipped=0, steps=1, losses=(1.0,), seconds=1.0, memory=MEMORY)


class Process:
    next_sample = None

    def __init__(self, deliver, threads):
        self.order = None

    def speaks(self, said):
        return said[0] is self

    def hear(self, said):
        return said[1]

    def train(self, order, sample_s):
        self.order = order

    def end(self):
        pass


@pytest.fixture
def pool(monkeypatch):
    """Three devices train at once, a to c; the lower their rank, the earlier their results arrive."""
    monkeypatch.setattr(pools, "TrainingProcess", Process)
    posted = []
    pool = Pool(load_config("demo"), 3, lambda said: None, lambda client, event: posted.append(client), lambda order: order["rank"])
    pool.posted = posted
    pool.greet("greeter")
    greet(pool)
    posted.clear()
    for client, rank in (("a", 2), ("b", 3), ("c", 1)):
        pool.submit(client, {"stage": 1, "rank": rank}, 0.5)
        greet(pool)
    return pool


def greet(pool):
    for seat in list(pool._seats):
        if not seat.ready:
            pool.hear((seat.process, WorkerReady("2", "m")))


def finish(pool, *clients):
    for seat in list(pool._seats):
        if seat.job and seat.job.client in clients:
            pool.hear((seat.process, DONE))


def test_with_a_rank_results_wait_for_all_and_come_in_its_order(pool):
    finish(pool, "b", "a")
    assert not pool.release()
    assert pool.posted == []
    finish(pool, "c")
    while pool.release():
        pass
    assert pool.posted == ["c", "a", "b"]


def test_the_result_of_a_client_that_needs_none_any_more_is_dropped(pool):
    finish(pool, "a", "b", "c")
    assert pool.release()
    pool.cancel("a")
    assert pool.release()
    assert not pool.release()
    assert pool.posted == ["c", "b"]
