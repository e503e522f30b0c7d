"""Everything that can go wrong and be explained, as one tree.

    LwfedError                       1   anything below; never raised itself
    ├── ConfigError                 78   the configuration is wrong (EX_CONFIG)
    ├── DataError                   66   images are missing or unreadable (EX_NOINPUT)
    ├── StateError                  73   the state directory is unusable, in use, or of another run (EX_CANTCREAT)
    │   ├── DiskTrouble             74   its disk is full or fails, or it is held by somebody (EX_IOERR), try again later
    │   └── DatabaseUnreachable     69   no connection to the database (EX_UNAVAILABLE), try again later
    ├── MissingDependency           72   an optional package is needed for this (EX_OSFILE)
    ├── RunStopped                  65   a stage collapsed, and the run was to stop then (EX_DATAERR)
    ├── WorkerFailed                70   a training process died or raised (EX_SOFTWARE)
    ├── Unfit                       71   training does not fit into the memory that it may take (EX_OSERR)
    ├── Diverged                    70   training produced a loss or weight that is not finite
    └── WireError                   76   the other side cannot be understood (EX_PROTOCOL)
        ├── ProtocolMismatch        76   it speaks a version that we do not
        ├── InvalidMessage          76   a message does not parse or breaks its limits
        ├── InvalidPayload          76   bytes that fit neither their digest nor the plan
        │   └── NotFinite           76   tensors with values that are not finite
        └── TransportError          69
            ├── Unreachable         69   no connection to the broker (EX_UNAVAILABLE), try again later
            ├── PortInUse           75   something else listens there (EX_TEMPFAIL)
            └── Refused             77   the broker refuses us (EX_NOPERM)
                ├── Forbidden       77   it lets us in, but not to our topics
                └── Untrusted       77   its certificate is not of an authority that we trust, or of another host

A message says what happened, with which value, and what to do next. The command line prints it after
`error:` and ends with the class's `exit_code`; usage errors of click end with 2. A service must not be
restarted on 2, 65, 66, 71, 72, 73, 76, 77 and 78: nothing changes until somebody acts.
"""

from __future__ import annotations

import re
from typing import Literal

_TOKEN = re.compile(r"[\w.-]*eyJ[\w.=-]{20,}")  # lwfed1.eyJ..., JSON in base64url; perhaps not all of it


def hide_tokens(text: str) -> str:
    """The text without what looks like a token, which may have been given where something else belongs."""
    return _TOKEN.sub("(a token)", text)


class LwfedError(Exception):
    exit_code = 1

    def __str__(self) -> str:
        return hide_tokens(super().__str__())


class ConfigError(LwfedError):
    exit_code = 78


class DataError(LwfedError):
    exit_code = 66


class StateError(LwfedError):
    exit_code = 73


class DiskTrouble(StateError):
    exit_code = 74


class DatabaseUnreachable(StateError):
    exit_code = 69


class MissingDependency(LwfedError):
    exit_code = 72


class RunStopped(LwfedError):
    exit_code = 65


class WorkerFailed(LwfedError):
    exit_code = 70


class Unfit(LwfedError):
    """Training does not fit into the memory that it may take."""

    exit_code = 71


class Diverged(LwfedError):
    exit_code = 70


class WireError(LwfedError):
    exit_code = 76


class ProtocolMismatch(WireError):
    pass


class InvalidMessage(WireError):
    pass


class InvalidPayload(WireError):
    code: Literal["content", "not_finite"] = "content"  # by which a server refuses such an update


class NotFinite(InvalidPayload):
    code = "not_finite"


class TransportError(WireError):
    exit_code = 69


class Unreachable(TransportError):
    pass


class PortInUse(TransportError):
    exit_code = 75


class Refused(TransportError):
    exit_code = 77


class Forbidden(Refused):
    pass


class Untrusted(Refused):
    pass
