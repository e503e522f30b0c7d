"""Files named by the SHA-256 of their content, and files that are still arriving in chunks.

    <root>/<digest>                      a blob; appears by rename, complete
    <root>/parts/<digest>-<layout>.part  a blob on its way; which chunks it has is found by hashing them again
    <root>/parts/<digest>-<layout>-<owner>.part  the same, where several send it and none may spoil another's
    <root>/temporary-*                   being written; deleted when the store is opened

A part file needs no record beside it: after a power cut some chunks may be missing that had been written, never the
other way round, because a chunk counts as present only when its bytes hash to what the manifest says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

from lwfed import disk
from lwfed.errors import InvalidPayload, StateError
from lwfed.wire.messages import MAX_BLOB_BYTES, MAX_CHUNKS, MIN_CHUNK_BYTES, BlobRef, Manifest

_READ_BYTES = 1 << 20


class Arrival(ABC):
    """A blob whose chunks arrive in any order."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._missing = set(range(len(manifest.digests)))

    @property
    def complete(self) -> bool:
        return not self._missing

    @property
    def have_bytes(self) -> int:
        return self.manifest.blob.size - sum(chunk_length(self.manifest, index) for index in self._missing)

    def missing(self) -> list[int]:
        return sorted(self._missing)

    def write(self, index: int, data: bytes) -> bool:
        """Keep a chunk; False when it was there. Raises InvalidPayload for bytes that are not this chunk."""
        check_chunk(self.manifest, index, data)
        if index not in self._missing:
            return False
        self._keep(index, data)
        self._missing.discard(index)
        return True

    def commit(self) -> Path:
        """The finished blob in its store, durable. Raises InvalidPayload when it is not whole."""
        if self._missing:
            raise InvalidPayload(f"blob {self.manifest.blob.id[:12]} still lacks {len(self._missing)} chunks")
        return self._install()

    @abstractmethod
    def _keep(self, index: int, data: bytes) -> None: ...
    @abstractmethod
    def _install(self) -> Path: ...


class Holdings(Protocol):
    """What a device needs of the store that keeps its model: a BlobStore, or one that borrows the bytes in a simulation."""

    def has(self, id: str) -> bool: ...
    def path(self, id: str) -> Path: ...
    def read(self, id: str) -> bytes: ...
    def part(self, manifest: Manifest) -> Arrival: ...
    def adopt(self, path: Path) -> BlobRef: ...
    def forget(self, keep: Collection[str]) -> None: ...


class BlobStore:
    """The blobs below `root`; one process at a time. `durable=False` leaves out fsync, for simulations."""

    def __init__(self, root: Path, durable: bool = True) -> None:
        self._root = root
        self._parts = root / "parts"
        self._durable = durable
        self._refs: dict[str, BlobRef] = {}  # blobs verified in this process
        self._manifests: dict[tuple[str, int], Manifest] = {}
        with _explained(root):
            self._parts.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob("temporary-*"):
                leftover.unlink()

    def put(self, data: bytes) -> BlobRef:
        """Store `data`; nothing is written when it is held already."""
        ref = BlobRef(id=hashlib.sha256(data).hexdigest(), size=len(data))
        if not self.has(ref.id):
            with _explained(self._root):
                handle, name = tempfile.mkstemp(prefix="temporary-", dir=self._root)
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                self._install(Path(name), ref)
        return ref

    def adopt(self, path: Path) -> BlobRef:
        """Move the file at `path` into the store."""
        with _explained(path):
            found = path.stat()
            ref = BlobRef(id=_digest(path), size=found.st_size)
            if self.has(ref.id):
                path.unlink()
            elif found.st_dev == self._root.stat().st_dev:
                self._install(path, ref)
            else:
                handle, name = tempfile.mkstemp(prefix="temporary-", dir=self._root)
                os.close(handle)
                shutil.copyfile(path, name)
                self._install(Path(name), ref)
                path.unlink()
        return ref

    def has(self, id: str) -> bool:
        """Whether the blob is held intact: the first question in this process reads it, and removes it when it rotted."""
        if not os.path.isfile(f"{self._root}/{id}"):  # asked all the time: a Path takes longer than the system
            self._refs.pop(id, None)
            return False
        if id not in self._refs:
            path = self._root / id
            with _explained(path):
                if _digest(path) != id:
                    path.unlink()
                    return False
                self._refs[id] = BlobRef(id=id, size=path.stat().st_size)
        return True

    def path(self, id: str) -> Path:
        """Raises StateError when the blob is not held."""
        self._demand(id)
        return self._root / id

    def read(self, id: str) -> bytes:
        path = self.path(id)
        with _explained(path):
            return path.read_bytes()

    def ref(self, id: str) -> BlobRef:
        self._demand(id)
        return self._refs[id]

    def manifest(self, id: str, chunk_bytes: int) -> Manifest:
        """How the blob is cut into pieces of `chunk_bytes`, the last one shorter. Raises StateError when it is not held, or has rotted."""
        key = id, chunk_bytes
        if key not in self._manifests:
            ref = self.ref(id)
            check_cut(ref.size, chunk_bytes)
            whole, digests = hashlib.sha256(), []
            with _explained(self._root), (self._root / id).open("rb") as file:
                while piece := file.read(chunk_bytes):
                    whole.update(piece)
                    digests.append(hashlib.sha256(piece).hexdigest())
            if whole.hexdigest() != id:
                self._drop_rotten(id)
            self._manifests[key] = Manifest(blob=ref, chunk_bytes=chunk_bytes, digests=tuple(digests))
        return self._manifests[key]

    def chunk(self, manifest: Manifest, index: int) -> bytes:
        """Raises StateError when the blob is not held, or this piece shows that it has rotted: then it is removed."""
        path = self.path(manifest.blob.id)
        with _explained(path), path.open("rb") as file:
            file.seek(index * manifest.chunk_bytes)
            data = file.read(manifest.chunk_bytes)
        if hashlib.sha256(data).hexdigest() != manifest.digests[index]:
            self._drop_rotten(manifest.blob.id)
        return data

    def part(self, manifest: Manifest, owner: str = "") -> PartFile:
        """Where the blob's chunks are gathered (those of `owner`, where others send the same), with those that an earlier process left."""
        # The layout is in the name, so that chunks are where the manifest cuts them.
        layout = hashlib.sha256(" ".join((str(manifest.chunk_bytes), *manifest.digests)).encode()).hexdigest()[:16]
        path = self._parts / f"{'-'.join(filter(None, (manifest.blob.id, layout, owner)))}.part"
        if owner and not path.exists() and self.has(manifest.blob.id):  # it had arrived, and was taken over, when we were killed
            with _explained(path):
                shutil.copyfile(self.path(manifest.blob.id), path)
        return PartFile(self, path, manifest)

    def remove(self, id: str) -> None:
        with _explained(self._root):
            (self._root / id).unlink(missing_ok=True)
        self._refs.pop(id, None)
        for key in [key for key in self._manifests if key[0] == id]:
            del self._manifests[key]

    def forget(self, keep: Collection[str]) -> None:
        """Delete all blobs and parts of blobs but those of `keep`."""
        with _explained(self._root):
            for name in _files(self._root) - set(keep):
                self.remove(name)
            for name in _files(self._parts):
                if name.partition("-")[0] not in keep:
                    (self._parts / name).unlink(missing_ok=True)

    def _drop_rotten(self, id: str) -> NoReturn:
        self.remove(id)
        raise self._not_held(id)

    def _demand(self, id: str) -> None:
        if not self.has(id):
            raise self._not_held(id)

    def _not_held(self, id: str) -> StateError:
        return StateError(f"blob {id[:12]} is not in {self._root}: it was deleted or damaged; start again to fetch or rebuild it")

    def _install(self, path: Path, ref: BlobRef) -> None:
        if self._durable:
            disk.install(path, self._root / ref.id)
        else:
            os.replace(path, self._root / ref.id)
        self._refs[ref.id] = ref


class PartFile(Arrival):
    """Chunks in a file of the blob's length, where they are found again. Made by `BlobStore.part`."""

    def __init__(self, store: BlobStore, path: Path, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._store = store
        self._path = path
        with _explained(path):
            if path.exists():
                self._missing -= set(self._found())
            else:
                self._create()

    def commit(self) -> Path:
        """Starts from nothing when the whole differs from what its name promises."""
        if self._store.has(self.manifest.blob.id):
            self._path.unlink(missing_ok=True)
            return self._store.path(self.manifest.blob.id)
        return super().commit()

    def verify(self) -> Path:
        """The file, once it is complete. Raises InvalidPayload, and starts from nothing, where it is not what its name promises."""
        with _explained(self._path):
            if self._path.exists() and _digest(self._path) == self.manifest.blob.id:
                return self._path
        self.discard()
        raise InvalidPayload(f"the chunks of blob {self.manifest.blob.id[:12]} do not make up what its name promises")

    def discard(self) -> None:
        """Delete what has arrived; the next chunk begins anew."""
        with _explained(self._path):
            self._path.unlink(missing_ok=True)
        self._missing = set(range(len(self.manifest.digests)))

    def _keep(self, index: int, data: bytes) -> None:
        with _explained(self._path):
            if not self._path.exists():  # discarded by a commit that failed
                self._create()
            with self._path.open("r+b") as file:
                file.seek(index * self.manifest.chunk_bytes)
                file.write(data)

    def _install(self) -> Path:
        blob, path = self.manifest.blob, self.verify()
        with _explained(path):
            self._store._install(path, blob)
        return self._store.path(blob.id)

    def _create(self) -> None:
        with self._path.open("wb") as file:
            file.truncate(self.manifest.blob.size)  # a file with holes: costs nothing yet

    def _found(self) -> Iterator[int]:
        with self._path.open("rb") as file:
            for index, digest in enumerate(self.manifest.digests):
                if hashlib.sha256(file.read(self.manifest.chunk_bytes)).hexdigest() == digest:
                    yield index


def chunk_length(manifest: Manifest, index: int) -> int:
    return min(manifest.chunk_bytes, manifest.blob.size - index * manifest.chunk_bytes)


def check_chunk(manifest: Manifest, index: int, data: bytes) -> None:
    """Raises InvalidPayload for bytes that are not this chunk."""
    if not 0 <= index < len(manifest.digests):
        raise InvalidPayload(f"chunk {index} of a blob of {len(manifest.digests)}")
    if len(data) != chunk_length(manifest, index) or hashlib.sha256(data).hexdigest() != manifest.digests[index]:
        raise InvalidPayload(f"chunk {index} of blob {manifest.blob.id[:12]} was damaged on its way")


def check_cut(size: int, chunk_bytes: int) -> None:
    """Raises InvalidPayload when a blob of `size` bytes cannot travel in pieces of `chunk_bytes`."""
    pieces = -(-size // chunk_bytes) if chunk_bytes >= MIN_CHUNK_BYTES else MAX_CHUNKS + 1
    if size > MAX_BLOB_BYTES or pieces > MAX_CHUNKS:
        raise InvalidPayload(
            f"{size} bytes cannot travel in pieces of {chunk_bytes}: at most {MAX_CHUNKS} pieces and {MAX_BLOB_BYTES} bytes; "
            "take a smaller model or fewer layers per stage, raise transfer.chunk_bytes, or let the broker take larger packets"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"cannot use {error.filename or path}: {error.strerror or error}; check free space and permissions"
        raise disk.unusable(text, error) from error


def _files(folder: Path) -> set[str]:
    """Their names; folders are of others, such as tools that index or snapshot."""
    with os.scandir(folder) as found:
        return {one.name for one in found if not one.is_dir(follow_symlinks=False)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
