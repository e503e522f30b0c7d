"""What a simulated device holds of the model: names alone, because the bytes lie on the same disk at the server.

Chunks are checked as on a device, and what is not held is downloaded, so that traffic is that of a real device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

from lwfed.blobs import Arrival, BlobStore
from lwfed.errors import StateError
from lwfed.wire.messages import BlobRef, Manifest


class BorrowedBlobs:
    """`lwfed.blobs.Holdings` of one device; `held` is what it had when it was stopped."""

    def __init__(self, lender: BlobStore, held: Iterable[str] = ()) -> None:
        self.held = set(held)
        self._lender = lender

    def has(self, id: str) -> bool:
        return id in self.held and self._lender.has(id)

    def path(self, id: str) -> Path:
        if not self.has(id):
            raise StateError(f"a simulated device does not hold blob {id[:12]}")
        return self._lender.path(id)

    def read(self, id: str) -> bytes:
        return self.path(id).read_bytes()

    def part(self, manifest: Manifest) -> BorrowedPart:
        return BorrowedPart(self, manifest)

    def adopt(self, path: Path) -> BlobRef:
        """The file at `path` goes; what it holds must be the server's too."""
        ref = BlobRef(id=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        path.unlink()
        self.held.add(ref.id)
        return ref

    def forget(self, keep: Collection[str]) -> None:
        self.held &= set(keep)


class BorrowedPart(Arrival):
    """Chunks that are not kept."""

    def __init__(self, holdings: BorrowedBlobs, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._holdings = holdings

    def _keep(self, index: int, data: bytes) -> None:
        pass

    def _install(self) -> Path:
        blob = self.manifest.blob.id
        self._holdings.held.add(blob)
        return self._holdings.path(blob)
