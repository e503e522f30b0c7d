"""Updates for a load test: made once a round, and varied by a few bytes for each device, so that each has a digest of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lwfed.blobs import BlobStore
from lwfed.config import RunConfig
from lwfed.edge_agent.events import WorkerDone
from lwfed.seeds import derive
from lwfed.wire import deltas, tensors
from lwfed.wire.report import Memory
from lwfed.wire.sizes import stated_shapes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NOISE = np.float32(1e-4)  # standard deviation of what a device changes
IMAGES = 100
VARIED = 2  # bytes at the end of the last tensor: below 32640 they are a finite number, or part of one, in every codec
Order = Mapping[str, Any]


class Training:
    """The workers of all devices of this process; `store` holds the model."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._made: tuple[object, bytes, bytes] = (None, b"", b"")  # (what for, all but the last bytes of the file, what precedes those)

    def received(self, order: Order) -> set[str]:
        """Blobs of the parts of which only differences were sent; they are in the store now."""
        codec = _config(order["config"]).transfer.codec
        patched = [told for told in order["parts"].values() if not isinstance(told, str)]
        for told in patched:
            if codec != "fp32" and not self._store.has(told["id"]):
                self._store.put(_patch(Path(told["base"]), [Path(file) for file in told["patches"]], codec))
        return {told["id"] for told in patched}

    def train(self, order: Order) -> WorkerDone:
        """Write the update of the device that was given this order. `received` comes first."""
        key = order["config"], order["stage"], order["round"]
        if self._made[0] != key:
            self._made = (key, *self._make(_config(order["config"]), order))
        file = Path(order["out"])
        file.write_bytes(b"".join([*self._made[1:], int(order["participant"]).to_bytes(VARIED, "little")]))
        memory = Memory(baseline_mb=100.0, peak_mb=150.0, peak_source="samples", curve=())
        return WorkerDone(file, IMAGES, skipped=0, steps=1, losses=(1.0,), seconds=1.0, memory=memory)

    def _make(self, config: RunConfig, order: Order) -> tuple[bytes, bytes]:
        received = self._load(order, config.plan(order["stage"]).uploaded)
        random = np.random.default_rng(derive(config.run.seed, "load", order["stage"], order["round"]))
        change = {name: NOISE * random.standard_normal(tensor.shape, np.float32) for name, tensor in sorted(received.items())}
        transfer = config.transfer
        if transfer.codec == "fp32":
            return tensors.encode({name: received[name] + change[name] for name in received})[:-VARIED], b""
        data = deltas.encode(change, transfer.codec, transfer.top_k, 0).data
        return _open_ended(data)

    def _load(self, order: Order, parts: tuple[str, ...]) -> dict[str, tensors.Array]:
        found: dict[str, tensors.Array] = {}
        for part in parts:
            told = order["parts"][part]
            path = Path(told) if isinstance(told, str) else self._store.path(told["id"])
            found |= tensors.read(path)
        return found


def _open_ended(data: bytes) -> tuple[bytes, bytes]:
    """A file of differences whose last bytes were taken away, and the head of the last block of zstd, in which they follow as they are."""
    raw = zstd.decompress(data[len(deltas.MAGIC) :])
    compressor = zstd.ZstdCompressor(deltas.LEVEL)
    begun = compressor.compress(raw[:-VARIED]) + compressor.flush(zstd.ZstdCompressor.FLUSH_BLOCK)
    return deltas.MAGIC + begun, (VARIED << 3 | 1).to_bytes(3, "little")  # RFC 8878, 3.1.1.2: its size; raw; the last one


def _patch(base: Path, patches: list[Path], codec: deltas.Codec) -> bytes:
    shapes = stated_shapes(base)
    found = tensors.decode(base, shapes)
    for file in patches:
        change = deltas.decode(file.read_bytes(), shapes, codec)
        found = {name: tensor + change[name] for name, tensor in found.items()}
    return tensors.encode(found)


@cache
def _config(path: str) -> RunConfig:
    return RunConfig.from_bytes(Path(path).read_bytes())
