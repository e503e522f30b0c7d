"""Whole runs of real processes over links that may be bad, for comparison of their results."""

from contextlib import ExitStack
from dataclasses import dataclass

from lwfed.tools.links.proxy import Proxy

from .conftest import Fleet, digest_of_result, free_port

CHUNK_BYTES, WINDOW = 8192, 4
SMALLER = (
    *(f"transfer.chunk_bytes={CHUNK_BYTES}", f"transfer.window={WINDOW}", "transfer.codec=int8"),
    *("train.epochs=1", "train.batch_size=256", "calibration.every=never", "evaluation.data=null"),
)
TWO_STAGES = (*SMALLER, "model.depth=2", "stages.rounds_per_stage=2")
PLACES = ((1, 1), (1, 2), (2, 1))  # stage and round of these, all but the last


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
