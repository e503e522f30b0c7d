"""Who may do what at a managed mosquitto, as its dynamic security plugin takes it: all at its start, changes live.

Each account has a role of its own by the same name: mosquitto 2.0 has no place for the user's name in a role. What is
not allowed is denied, reading by default of the filters subscribed to. A device that is cut off is deleted and not
disabled: mosquitto 2.0 disconnects a disabled client, but lets one with a certificate in again with all it may do.

A change that was sent may be lost, as every message may. The plugin answers each one; until it does, the change is not made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from lwfed.wire.commands import Command, Send
from lwfed.wire.topics import Topics

CONTROL = "$CONTROL/dynamic-security/v1"
ANSWERS = f"{CONTROL}/response"
SERVER = "lwfed.server"  # neither this nor a token's user can be that of a device, which is its name, without dots, or begins with a number
ITERATIONS = 101  # what the plugin itself does; more would not help a password of 256 random bits
AT_ONCE = 100  # changes in a message

Json = dict[str, Any]


@dataclass(frozen=True)
class Account:
    username: str
    publish: tuple[str, ...]  # filters of topics
    subscribe: tuple[str, ...]
    password: str | None = None  # None: known by its certificate only
    literally: tuple[str, ...] = ()  # filters that may be subscribed to as they are, and not parts of what they cover


class _Answer(BaseModel):
    username: str = Field(alias="correlationData")
    command: str
    error: str = ""


class _Answers(BaseModel):
    responses: tuple[_Answer, ...]


def server_account(topics: Topics) -> Account:
    return Account(SERVER, (topics.everything, CONTROL), (topics.everything, ANSWERS))


def device_account(topics: Topics, device: str, username: str) -> Account:
    """Of its own topics it gets all or nothing: the broker would keep any number of filters below, 50 kB for one of 80 levels."""
    return Account(username, (topics.all_from_device(device),), (topics.all_blobs,), literally=topics.for_device(device))


def token_account(topics: Topics, token: str, password: str) -> Account:
    return Account(token_user(token), (topics.from_token(token),), (topics.to_token(token),), password)


def token_user(token: str) -> str:
    return f"enrol.{token}"


def document(accounts: Iterable[Account]) -> bytes:
    """The plugin's file."""
    known = list(accounts)
    access = {"publishClientSend": False, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
    clients = [{**_client(one), **(_hashed(one.password) if one.password else {})} for one in known]
    return json.dumps({"defaultACLAccess": access, "clients": clients, "groups": [], "roles": [_role(one) for one in known]}).encode()


def creation(account: Account) -> list[Json]:
    """Harmless where it exists already."""
    password = {"password": account.password} if account.password else {}
    changes = [{"command": "createRole", **_role(account)}, {"command": "createClient", **_client(account), **password}]
    return [{**change, "correlationData": account.username} for change in changes]


def removal(username: str) -> list[Json]:
    """Ends its connection as well; harmless where it does not exist."""
    changes = [{"command": "deleteClient", "username": username}, {"command": "deleteRole", "rolename": username}]
    return [{**change, "correlationData": username} for change in changes]


def control(changes: Sequence[Json]) -> list[Command]:
    parts = (changes[start : start + AT_ONCE] for start in range(0, len(changes), AT_ONCE))
    return [Send(CONTROL, json.dumps({"commands": part}).encode()) for part in parts]


def confirmed(payload: bytes) -> Iterator[tuple[str, str]]:
    """Of an answer of the plugin: (username, command) of what it has done, or found done already."""
    try:
        answers = _Answers.model_validate_json(payload).responses
    except ValidationError:
        return  # to a command of somebody else
    for one in answers:
        if not one.error or "exists" in one.error or "not found" in one.error:
            yield one.username, one.command


def _client(account: Account) -> Json:
    return {"username": account.username, "roles": [{"rolename": account.username}]}


def _role(account: Account) -> Json:
    rules = [("publishClientSend", topic) for topic in account.publish] + [("subscribePattern", topic) for topic in account.subscribe]
    rules += [("subscribeLiteral", topic) for topic in account.literally]
    # Below $CONTROL reading is denied unless it is allowed.
    rules += [("publishClientReceive", topic) for topic in account.subscribe if topic.startswith("$")]
    return {"rolename": account.username, "acls": [{"acltype": kind, "topic": topic, "allow": True} for kind, topic in rules]}


def _hashed(password: str) -> Json:
    salt = secrets.token_bytes(12)
    found = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS, 64)
    return {"password": base64.b64encode(found).decode(), "salt": base64.b64encode(salt).decode(), "iterations": ITERATIONS}
