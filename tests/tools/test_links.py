"""The bad links that tests and `lwfed bench links` use, and what the table makes of a run."""

import contextlib
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from lwfed.tools.cli import main
from lwfed.tools.links import table
from lwfed.tools.links.proxy import Counts, Link, Proxy


@contextmanager
def echoing():
    """The address of a service that says back what it is told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = []

        def serve(connection):
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65_536):
                    connection.sendall(data)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join()


def through(proxy, data):
    """What comes back of `data`, until the end of the connection if it is cut."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as connection:
        back = bytearray()
        with contextlib.suppress(OSError):
            connection.sendall(data)
        with contextlib.suppress(OSError):
            while len(back) < len(data) and (piece := connection.recv(65_536)):
                back += piece
        return bytes(back)


def test_a_link_passes_all_bytes_and_counts_them():
    data = bytes(range(256)) * 1000
    with echoing() as target, Proxy(target, Link(), seed=0) as proxy:
        assert through(proxy, data) == data
        assert proxy.counts == Counts(256_000, 256_000, 0)


def test_a_slow_and_late_link_takes_its_time():
    with echoing() as target, Proxy(target, Link(rate=500_000, delay_s=0.1), seed=0) as proxy:
        began = time.monotonic()
        assert len(through(proxy, bytes(100_000))) == 100_000
        assert 0.4 <= time.monotonic() - began < 5, "0.2 s for the bytes and 0.1 s each way"


def test_a_stall_holds_everything_up_and_loses_nothing():
    with echoing() as target, Proxy(target, Link(stall_every_s=0.5, stall_s=0.3), seed=0) as proxy:
        waits, until = [], time.monotonic() + 30
        while not (waits and min(waits) < 0.2 and max(waits) > 0.25) and (began := time.monotonic()) < until:
            assert through(proxy, b"ping") == b"ping"
            waits.append(time.monotonic() - began)
    assert max(waits) > 0.25, "what comes during a stall"
    assert min(waits) < 0.2, "what comes between two"


def test_cuts_come_at_the_bytes_that_the_seed_decides_on():
    def cuts(seed):
        with echoing() as target, Proxy(target, Link(cut_every_bytes=20_000), seed) as proxy:
            found = []
            for _ in range(3):
                through(proxy, bytes(100_000))
                counts = proxy.counts
                found.append(counts.up_bytes + counts.down_bytes)
            assert counts.cuts == 3
            return found

    assert cuts(1) == cuts(1) != cuts(2)


def test_a_cut_leaves_the_first_bytes_and_the_next_connection_works():
    with echoing() as target, Proxy(target, Link(cut_every_bytes=1000), seed=3) as proxy:
        assert len(through(proxy, bytes(100_000))) < 2000
        assert proxy.counts.cuts == 1
        assert through(proxy, b"again") == b"again"


def test_without_a_broker_a_connection_ends_at_once():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = gone.getsockname()
    with Proxy(target, Link(), seed=0) as proxy:
        assert through(proxy, b"hello") == b""


def run_events(seconds, updates):
    rounds = [{"event": "round", "status": status, "time": time} for status, time in (("started", 10.0), ("closed", 10.0 + seconds))]
    return [*rounds, *({"event": "contribution"} for _ in range(updates))]


def test_a_row_says_what_a_link_cost_a_device():
    first = table.record(run_events(8.0, 8), [Counts(1000, 3000, 0), Counts(3000, 5000, 0)], None)
    assert (first["up_bytes"], first["down_bytes"], first["beyond_bytes"], first["beyond_bytes_per_cut"]) == (2000, 4000, 0, None)
    cut = table.record(run_events(9.5, 7), [Counts(1500, 3500, 1), Counts(3000, 5600, 3)], first)
    assert (cut["seconds_per_round"], cut["updates"], cut["cuts"]) == (9.5, 7, 4)
    assert (cut["beyond_bytes"], cut["beyond_bytes_per_cut"]) == (800, 400), "of a device; of a cut, of which there were two a device"


@pytest.mark.parametrize(("encoders", "updates", "code"), [("aa", 8, 0), ("ab", 8, 1), ("aa", 7, 1)])
@pytest.mark.parametrize("as_json", [True, False])
def test_the_table_fails_where_an_update_or_a_bit_was_lost(monkeypatch, encoders, updates, code, as_json):
    found = iter(encoders)

    def measured(name, link, broker, settings, first):
        record = table.record(run_events(1.0, updates), [Counts(1000, 3000, 0)], first)
        return {"name": name, **record, "encoder_sha256": next(found)}

    monkeypatch.setattr(table, "measure", measured)
    monkeypatch.setattr(table, "LINKS", {"fast": Link(), "slow": Link(rate=1000)})
    done = CliRunner().invoke(main, ["bench", "links", *(["--json"] if as_json else [])])
    assert done.exit_code == code, done.output
    if as_json:
        report = json.loads(done.stdout)
        assert (report["encoders"], report["lost"]) == (len(set(encoders)), 16 - 2 * updates)
    else:
        assert ("DIFFERENT" in done.stdout) == (encoders == "ab")
        assert f"{updates} of 8" in done.stdout
