"""Everything that reads bytes from the network, or what a person was sent, as functions of bytes, with samples of what it should read.

What is wrong is refused by an exception of ours, which the callers know; any other would end a server or an agent.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np

from lwfed.blobs import BlobStore, check_chunk
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.enrolment import admit
from lwfed.cloud_server.permissions import confirmed
from lwfed.cloud_server.registry import Device
from lwfed.cloud_server.weights import check
from lwfed.config import RunConfig, load_config
from lwfed.edge_agent.enrolment import signing_request
from lwfed.errors import ConfigError, InvalidMessage, InvalidPayload, LwfedError, ProtocolMismatch
from lwfed.models import onnx_file
from lwfed.wire import deltas, tensors
from lwfed.wire import messages as m
from lwfed.wire.enrolment import Enrol
from lwfed.wire.ranges import indices, ranges
from lwfed.wire.signed import Believe, signed, unverified, verifier
from lwfed.wire.sizes import Codec, largest_bytes, stated_shapes
from lwfed.wire.token import Header, Token, digest
from lwfed.wire.topics import Topics

from .samples import ID, MANIFEST, SAMPLES

SHAPES = {"blocks.0.w": (3, 4), "conv.w": (2, 3, 2, 2), "norm.b": (5,), "scalar": ()}
TENSORS = {name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in SHAPES.items()}
RANGES = 1200
TOPICS = Topics("fleet")
CHUNK = bytes(range(256)) * 5


def _manifest() -> m.Manifest:
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder), durable=False)
        return store.manifest(store.put(CHUNK).id, 1024)


CUT = _manifest()


@dataclass(frozen=True)
class Decoder:
    samples: tuple[bytes, ...]
    decode: Callable[[bytes], object]
    refuses: tuple[type[LwfedError], ...] = (InvalidMessage,)


def _message(model: type[m.Message]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        message = m.decode(model, data)
        assert m.decode(model, m.encode(message)) == message
        return message

    return decode


def _server_state(data: bytes) -> object:
    state = m.decode_server_state(data)
    assert m.decode_server_state(m.encode(state)) == state
    return m.speaks_our_version(state)


def _ranges(data: bytes) -> object:
    """As both ends read the chunks that are missing."""
    missing = m.decode(m.Grant, data).missing
    found = indices(missing, RANGES)
    assert all(0 <= index < RANGES for index in found)
    return found


def _topic(data: bytes) -> object:
    return TOPICS.parse(data.decode("utf-8", "surrogateescape"))


def _chunk(data: bytes) -> object:
    """Two bytes of index, then the chunk."""
    return check_chunk(CUT, int.from_bytes(data[:2], "big"), data[2:])


def _gathering(data: bytes) -> object:
    """A manifest, and a chunk for it, as a device takes them."""
    stated, _, chunk = data.partition(b"\n")
    manifest = m.decode(m.Manifest, stated)
    with tempfile.TemporaryDirectory() as folder:
        part = BlobStore(Path(folder), durable=False).part(manifest)
        part.write(0, chunk)
        return part.commit() if part.complete else ranges(part.missing())


def _tensors(data: bytes) -> object:
    found = tensors.decode(data, SHAPES)
    assert {name: tensor.shape for name, tensor in found.items()} == SHAPES
    assert all(np.isfinite(tensor).all() for tensor in found.values())
    return found


def _shapes(data: bytes) -> object:
    """And what they take, as a device reckons it."""
    with _file(data) as path:
        found = stated_shapes(path)
    return [largest_bytes(found, codec) for codec in get_args(Codec)]


def _update(codec: Codec) -> Decoder:
    """As a server checks it before it counts."""
    transfer = load_config("demo", [f"transfer.codec={codec}"]).transfer

    def decode(data: bytes) -> object:
        with _file(data) as update, _file(tensors.encode(TENSORS)) as received:
            return check(transfer, [received], update)

    sample = tensors.encode(TENSORS) if codec == "fp32" else deltas.encode(TENSORS, codec, 1.0, 1).data
    return Decoder((sample,), decode, (InvalidPayload,))


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        yield path


def _deltas(codec: deltas.Codec) -> Decoder:
    def decode(data: bytes) -> object:
        found = deltas.decode(data, SHAPES, codec)
        assert all(found[name].shape == shape and np.isfinite(found[name]).all() for name, shape in SHAPES.items())
        return found

    sample = deltas.encode(TENSORS, codec, 1.0, 1).data
    return Decoder((sample,), decode, (InvalidPayload,))


class Register:
    """In place of the registry: device `porch` is invited, and no more."""

    def __init__(self, secret: str) -> None:
        blank = dict.fromkeys(("request", "certificate", "joined_s", "revoked_s", "subject"))
        self._device = Device(name="porch", token=TOKEN.header.id, secret=digest(secret), expires_s=1.0, **blank)

    def of_token(self, token: str) -> Device:
        return self._device

    def certify(self, token: str, request: str, certificate: str) -> None:
        assert certificate.startswith("-----BEGIN CERTIFICATE-----")


def _invited() -> tuple[Authority, Token, str]:
    """A server's authority, the token that it gave a device, and the device's request."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        header = Header(device="porch", host="garden.local", port=8883, fleet="fleet", id="0123456789abcdef", secret="s" * 43)
        token = Token(header, authority.der)
        return authority, token, signing_request(token, Path(folder) / "identity")


AUTHORITY, TOKEN, REQUEST = _invited()


def _admit(data: bytes) -> object:
    """Whatever a bearer of the token says, there is an answer, and it can be sent."""
    register: Any = Register(TOKEN.header.secret)
    return m.encode(admit(AUTHORITY, register, TOKEN.header.id, data, 0.0))


def _certify(data: bytes) -> object:
    return AUTHORITY.certify(data, "porch")


def _token(data: bytes) -> object:
    """As a person pastes it."""
    token = Token.parse(data.decode("utf-8", "surrogateescape"))
    assert Token.parse(str(token)) == token
    return token


def _authority(data: bytes) -> object:
    """Of a token: what a device makes of it before it asks."""
    with tempfile.TemporaryDirectory() as folder:
        return signing_request(Token(TOKEN.header, data), Path(folder) / "identity")


def _confirmed(data: bytes) -> object:
    """As a server notes it."""
    return {username: {command} for username, command in confirmed(data)}


def _signed() -> tuple[bytes, Believe]:
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        return signed(m.encode(SAMPLES["run"]), "fleet", authority.sign), verifier(authority.pem, "fleet")


def _announcement(data: bytes) -> object:
    """As an enrolled device takes it: what is not as it was signed goes no further."""
    unverified(data)
    announcement = BELIEVE(data)
    assert announcement == m.encode(SAMPLES["run"])
    return m.decode(m.Run, announcement)


def _of_every_kind() -> Mapping[str, Decoder]:
    refuses = InvalidMessage, ProtocolMismatch
    return {f"message-{name}": Decoder((m.encode(sample),), _message(type(sample)), refuses) for name, sample in SAMPLES.items()}


TOPICS_BUILT = (
    TOPICS.server_state,
    TOPICS.run,
    TOPICS.blob_chunk(ID[:32], 3),
    TOPICS.from_device("device-1", "offer"),
    TOPICS.update_chunk("device-1", "w0", "c0" * 16, 12),
    TOPICS.to_device("device-1", "grant"),
)
GRANTED = tuple(m.encode(m.Grant(contribution="c", worker="w0", missing=missing, window=4)) for missing in ("", "0-2,7", "0-1199", "5-3"))
ANSWERED = (
    b'{"responses":[{"command":"createRole","error":"Role already exists","correlationData":"porch"},'
    b'{"command":"createClient","correlationData":"porch"}]}',
    b'{"responses":[{"command":"deleteClient","error":"Client not found","correlationData":"enrol.0123456789abcdef"}]}',
)
ANNOUNCED, BELIEVE = _signed()
GRAPHS = tuple(path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("golden/layer-*.onnx")))
DECODERS: Mapping[str, Decoder] = {
    **_of_every_kind(),
    "server-state": Decoder((m.encode(SAMPLES["server-state"]),), _server_state),
    "announcement": Decoder((ANNOUNCED,), _announcement),
    "ranges": Decoder(GRANTED, _ranges, (InvalidMessage, ProtocolMismatch)),
    "topic": Decoder(tuple(topic.encode() for topic in TOPICS_BUILT), _topic, ()),
    "chunk": Decoder((b"\0\0" + CHUNK[:1024], b"\0\1" + CHUNK[1024:]), _chunk, (InvalidPayload,)),
    "gathering": Decoder(
        (m.encode(CUT) + b"\n" + CHUNK[:1024], m.encode(MANIFEST) + b"\n"),
        _gathering,
        (InvalidMessage, InvalidPayload, ProtocolMismatch),
    ),
    "tensors": Decoder((tensors.encode(TENSORS),), _tensors, (InvalidPayload,)),
    "shapes": Decoder((tensors.encode(TENSORS),), _shapes, (InvalidPayload,)),
    **{f"update-{codec}": _update(codec) for codec in get_args(Codec)},
    **{f"deltas-{codec}": _deltas(codec) for codec in get_args(deltas.Codec)},
    "config": Decoder((load_config("demo").to_bytes(),), RunConfig.from_bytes, (ConfigError,)),
    "token": Decoder((str(TOKEN).encode(),), _token, (ConfigError,)),
    "authority": Decoder((TOKEN.authority,), _authority, (ConfigError,)),
    "enrolment": Decoder((m.encode(Enrol(secret=TOKEN.header.secret, request=REQUEST)),), _admit, ()),
    "permissions": Decoder(ANSWERED, _confirmed, ()),
    "graph": Decoder(GRAPHS, onnx_file.read, (InvalidPayload,)),
    "signing-request": Decoder((REQUEST.encode(),), _certify, (InvalidPayload,)),
}


VALUES = (
    None, True, 0, -1, 1.5, -0.0, 1e400, 2**53, 2**64, -(2**70), "", "0" * 64, "9" * 5000, "0-999999", "7-3", "\u00b2", "\ud800", "a/b",
    [], {}, [[]], {"v": 1}, [1] * 2000,
)  # fmt: skip


def mutated(random: Random, samples: Sequence[bytes]) -> bytes:
    """One of `samples` with a few changes, or bytes that know nothing of them."""
    if random.random() < 0.1:
        return random.randbytes(random.randrange(300))
    data = random.choice(samples)
    for _ in range(random.randint(1, 3)):
        data = random.choice(CHANGES)(random, data, random.randint(0, len(data)))
    return data


def _swap(random: Random, data: bytes, place: int) -> bytes:
    """JSON with another value in one place; what is no JSON stays."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(found))
    if places:
        inner, key = random.choice(places)
        inner[key] = random.choice(VALUES)
    return json.dumps(found).encode()


def _places(value: object) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _flip(random: Random, data: bytes, place: int) -> bytes:
    return data[:place] + bytes([random.randrange(256)]) + data[place + 1 :]


def _cut(random: Random, data: bytes, place: int) -> bytes:
    return data[:place]


def _insert(random: Random, data: bytes, place: int) -> bytes:
    return data[:place] + random.randbytes(random.randint(1, 20)) + data[place:]


def _leave_out(random: Random, data: bytes, place: int) -> bytes:
    return data[:place] + data[place + random.randint(1, 20) :]


def _double(random: Random, data: bytes, place: int) -> bytes:
    return data[:place] + data[: random.randint(1, 200)] + data[place:]


CHANGES = (_swap, _swap, _flip, _flip, _cut, _insert, _leave_out, _double)
