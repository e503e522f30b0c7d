"""Tokens and their certificates, and what the gate makes of the registry: without a broker."""

import json
import sqlite3

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lwfed.cloud_server.authority import FILE_NAME, Authority
from lwfed.cloud_server.enrolment import LIFETIME_S, admit, invite
from lwfed.cloud_server.gate import Gate, Place
from lwfed.cloud_server.overview import overview
from lwfed.cloud_server.permissions import CONTROL
from lwfed.cloud_server.registry import Contact, Registry
from lwfed.cloud_server.server import Stop
from lwfed.errors import ConfigError, StateError
from lwfed.transport.base import Received
from lwfed.wire.enrolment import Admission, Enrol
from lwfed.wire.messages import Run, decode, encode
from lwfed.wire.signed import verifier
from lwfed.wire.topics import Topics

from .fleets import of

NOW_S = 1e9


def request():
    key = ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


class Office:
    """Authority and registry of one server, and devices that ask."""

    def __init__(self, folder):
        self.now_s = NOW_S
        self.authority, self.registry = Authority(folder), Registry(folder, lambda: self.now_s)
        self.registry.contact = Contact("garden.local", 8883, "default")

    def invite(self, name="porch"):
        return invite(self.authority, self.registry, name)

    def ask(self, token, request, secret=None):
        question = encode(Enrol(secret=secret or token.header.secret, request=request))
        return admit(self.authority, self.registry, token.header.id, question, self.now_s)


@pytest.fixture
def office(tmp_path):
    made = Office(tmp_path)
    yield made
    made.registry.close()


def test_a_token_says_where_and_whom_to_trust_and_its_secret_is_not_stored(office, tmp_path):
    token = office.invite()
    header = token.header
    assert (header.host, header.port, header.fleet, header.device) == ("garden.local", 8883, "default", "porch")
    assert token.authority == office.authority.der
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.header.id.encode() in stored
    assert token.header.secret.encode() not in stored


def test_a_lost_answer_is_given_again_until_the_device_has_come(office):
    token, asked = office.invite(), request()
    first = office.ask(token, asked)
    assert first.device == "porch"
    assert x509.load_pem_x509_certificate(first.certificate.encode()).subject.rfc4514_string() == "CN=porch"
    assert office.ask(token, asked) == first
    office.registry.confirm("porch")
    assert "used already" in office.ask(token, asked).refused


def test_a_device_that_never_got_its_answer_is_enrolled_by_a_new_token_when_the_first_has_expired(office):
    lost, asked = office.invite(), request()
    office.ask(lost, asked)
    office.now_s += LIFETIME_S
    assert "make a new one with `cloud-server enrol`" in office.ask(lost, asked).refused
    token = office.invite()
    assert "make a new one" in office.ask(lost, asked).refused
    admission = office.ask(token, asked)
    certificate = x509.load_pem_x509_certificate(admission.certificate.encode())
    assert (admission.device, certificate.subject.rfc4514_string()) == ("porch", f"CN={token.header.id}.porch")


def test_another_key_gets_no_certificate_by_a_used_token_and_the_operator_is_told_what_to_do(office):
    token = office.invite()
    office.ask(token, request())
    assert "cloud-server revoke porch" in office.ask(token, request()).refused
    office.registry.confirm("porch")  # by the thief, say
    assert "cloud-server revoke porch" in office.ask(token, request()).refused
    office.now_s += LIFETIME_S
    assert "cloud-server revoke porch" in office.ask(token, request()).refused
    with pytest.raises(StateError, match="somebody else used its token, `cloud-server revoke porch`"):
        office.invite()


def test_forged_expired_voided_and_revoked_tokens_are_refused_alike(office):
    old = office.invite()
    token = office.invite()
    revoked = office.invite("shed")
    office.registry.revoke("shed")
    answers = [office.ask(old, request()), office.ask(revoked, request()), office.ask(token, request(), secret="f" * 43)]
    office.now_s += LIFETIME_S
    answers.append(office.ask(token, request()))
    assert {answer.refused for answer in answers} == {answers[0].refused}
    assert "cloud-server enrol" in answers[0].refused
    assert not any(device.certificate for device in office.registry.devices())


def test_a_request_that_cannot_be_certified_leaves_the_token_good(office):
    token = office.invite()
    assert "signing request" in office.ask(token, "junk").refused
    assert "JSON" in admit(office.authority, office.registry, token.header.id, b"junk", NOW_S).refused
    assert office.ask(token, request()).device == "porch"


def test_a_token_needs_a_name_and_a_server_that_devices_can_reach(tmp_path):
    registry = Registry(tmp_path)
    for name, error in (("Front Porch", ConfigError), ("-porch", ConfigError), ("porch", StateError)):
        with pytest.raises(error):
            invite(Authority(tmp_path), registry, name)
    registry.close()


@pytest.mark.parametrize(
    ("text", "host", "port", "bind"),
    [
        ("garden.local", "garden.local", 8883, ""),
        ("192.0.2.7:9000", "192.0.2.7", 9000, "192.0.2.7"),
        ("[2001:db8::7]", "2001:db8::7", 8883, "2001:db8::7"),
        ("localhost:1", "localhost", 1, "127.0.0.1"),
    ],
)
def test_a_place_to_listen(text, host, port, bind):
    place = Place.parse(text)
    assert (place.host, place.port, place.bind) == (host, port, bind)


@pytest.mark.parametrize("text", ["", "0.0.0.0", "[::]:8883", "a:65535", "me@host", "mqtts://host", "host:x"])
def test_a_place_that_devices_cannot_be_told_of_is_refused(text):
    with pytest.raises(ConfigError, match="--listen"):
        Place.parse(text)


@pytest.fixture
def gate(tmp_path):
    (tmp_path / "authority").mkdir()
    made = Gate(tmp_path / "authority", Place("localhost", 8883), "default", lambda: NOW_S)
    yield made
    made.close()


@pytest.fixture
def beside(tmp_path, gate):
    """The same office, as another process sees it."""
    made = Office(tmp_path / "authority")
    yield made
    made.registry.close()


def changes(commands):
    """(command, whom) of what the broker is told."""
    return [(one["command"], one.get("username") or one["rolename"]) for one in told(commands)]


def told(commands):
    return [one for command in commands if command.topic == CONTROL for one in json.loads(command.payload)["commands"]]


def obey(gate, commands, **error):
    """Confirm as the plugin does, perhaps with an error; the changes."""
    answers = [{"command": one["command"], "correlationData": one["correlationData"], **error} for one in told(commands)]
    gate.on_answer(json.dumps({"responses": answers}).encode())
    return changes(commands)


def test_the_broker_is_told_of_what_other_processes_do_and_of_nothing_else(gate, beside):
    assert gate.poll(0) == []
    token = beside.invite()
    user = f"enrol.{token.header.id}"
    assert gate.poll(0.9) == []
    assert obey(gate, gate.poll(1.1)) == [("createRole", user), ("createClient", user)]
    assert gate.poll(2.2) == []
    *granted, answer = gate.answer(token.header.id, encode(Enrol(secret=token.header.secret, request=request())))
    assert obey(gate, granted) == [("createRole", "porch"), ("createClient", "porch")]
    assert decode(Admission, answer.payload).device == "porch"
    gate.seen("porch")
    assert obey(gate, gate.poll(3.3)) == [("deleteClient", user), ("deleteRole", user)]
    beside.registry.revoke("porch")
    assert obey(gate, gate.poll(4.4)) == [("deleteClient", "porch"), ("deleteRole", "porch")]
    assert gate.newly_revoked() == ["porch"]
    assert gate.newly_revoked() == []


def test_a_certificate_that_its_device_never_came_with_is_shut_out_when_it_is_invited_anew(gate, beside):
    beside.ask(beside.invite(), request())
    obey(gate, gate.poll(0))
    token = beside.invite()
    new, user = f"{token.header.id}.porch", f"enrol.{token.header.id}"
    found = obey(gate, gate.poll(1.1))
    assert [one for one in found if one[1] in ("porch", user)] == [
        ("deleteClient", "porch"), ("deleteRole", "porch"), ("createRole", user), ("createClient", user),
    ]  # fmt: skip
    *granted, _ = gate.answer(token.header.id, encode(Enrol(secret=token.header.secret, request=request())))
    role = told(granted)[0]
    assert (role["rolename"], role["acls"][0]["topic"]) == (new, "lwfed/default/d/porch/up/#")
    assert obey(gate, granted) == [("createRole", new), ("createClient", new)]
    gate.seen("porch")
    assert obey(gate, gate.poll(2.2)) == [("deleteClient", user), ("deleteRole", user)]
    beside.registry.revoke("porch")
    assert obey(gate, gate.poll(3.3)) == [("deleteClient", new), ("deleteRole", new)]
    assert gate.newly_revoked() == ["porch"]


@pytest.fixture
def revoked(gate, beside):
    """What the broker was told, in vain, when `porch` was enrolled and revoked."""
    gate.poll(0)
    token = beside.invite()
    gate.answer(token.header.id, encode(Enrol(secret=token.header.secret, request=request())))
    beside.registry.revoke("porch")
    return gate.poll(1.1)


def test_the_broker_is_told_once_a_second_until_it_confirms_the_outcome_and_not_the_history(gate, revoked):
    assert [change for change in changes(revoked) if change[1] == "porch"] == [("deleteClient", "porch"), ("deleteRole", "porch")]
    assert gate.poll(2.0) == []
    assert gate.poll(2.2) == revoked
    obey(gate, revoked, error="Client not found")  # an earlier one has arrived after all
    assert gate.poll(3.3) == []


@pytest.mark.parametrize("payload", [b"junk", b"[]", b"{}", b'{"responses": [1]}', b'{"responses": [{"command": "deleteClient"}]}'])
def test_neither_a_failure_nor_an_answer_to_others_confirms_anything(gate, revoked, payload):
    obey(gate, revoked, error="Internal error")
    gate.on_answer(payload)
    assert gate.poll(2.2) == revoked


def test_half_a_confirmation_is_none(gate, revoked):
    answers = [{"command": one, "correlationData": "porch"} for one in ("createClient", "createRole", "deleteClient")]
    gate.on_answer(json.dumps({"responses": answers}).encode())
    assert ("deleteRole", "porch") in changes(gate.poll(2.2))


def test_a_token_s_account_goes_with_its_time(tmp_path, gate, beside):
    token = beside.invite()
    gate.poll(0)
    gate._clock = lambda: NOW_S + LIFETIME_S
    assert changes(gate.poll(1.1))[0] == ("deleteClient", f"enrol.{token.header.id}")


def test_a_token_is_good_again_when_a_clock_that_jumped_ahead_is_put_right(gate, beside):
    user = f"enrol.{beside.invite().header.id}"
    obey(gate, gate.poll(0))
    gate._clock = lambda: NOW_S + 2 * LIFETIME_S
    assert obey(gate, gate.poll(1.1)) == [("deleteClient", user), ("deleteRole", user)]
    gate._clock = lambda: NOW_S + 60
    assert obey(gate, gate.poll(2.2)) == [("createRole", user), ("createClient", user)]
    assert gate.poll(3.3) == []


def test_a_broker_that_starts_knows_who_is_enrolled_then(tmp_path, gate, beside):
    for name in ("porch", "shed"):
        beside.ask(beside.invite(name), request())
    beside.registry.revoke("shed")
    gate.configure(tmp_path)
    known = json.loads((tmp_path / "permissions.json").read_text())
    assert {"lwfed.server", "porch"} <= {one["username"] for one in known["clients"]}
    assert "shed" not in str(known)
    assert gate.poll(0) == []


def test_a_gate_needs_a_usable_registry(tmp_path):
    Registry(tmp_path).close()
    with sqlite3.connect(tmp_path / "devices.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StateError, match="newer cloud-server"):
        Gate(tmp_path, Place("localhost", 8883), "default")


def test_a_lost_authority_is_not_replaced_while_devices_have_certificates_of_it(tmp_path, office):
    place = Place("localhost", 8883)
    office.invite()
    (tmp_path / FILE_NAME).unlink()
    Gate(tmp_path, place, "default").close()  # who is only invited is invited again
    office.ask(office.invite(), request())
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(StateError, match=rf"{FILE_NAME} is missing: put it back from the copy.* delete all of {tmp_path}"):
        Gate(tmp_path, place, "default")
    assert not (tmp_path / FILE_NAME).exists()


def test_a_run_goes_on_at_once_without_a_device_that_is_revoked_and_hears_it_no_more(world, said, gate, beside):
    fleet = world("rounds.quorum=0.5", "calibration.every=never")
    for name in ("a", "b"):
        beside.ask(beside.invite(name), request())
    fleet.start(gate=gate)
    slow, _ = fleet.bring("a"), fleet.bring("b")
    slow.poll = lambda now: None  # it never gets done
    fleet.settle(until=lambda: fleet.course.state.contributed)
    assert all(device.joined_s for device in beside.registry.devices())
    assert fleet.course.state.round == 1
    beside.registry.revoke("a")
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    assert fleet.now < fleet.config.rounds.deadline_s
    slow.restart()
    fleet.finish()
    assert slow.tasks == [(1, 1)]
    assert of(said, "device", device="a")[-1]["status"] == "is revoked"


def test_a_question_over_the_topic_of_a_token_is_answered_there(world, gate, beside):
    fleet = world()
    fleet.start(gate=gate)
    token = beside.invite()
    events = []
    device = fleet.broker.transport()
    topics = Topics("default")
    device.subscribe(topics.to_token(token.header.id))
    device.open("enrol", None, events.append)
    fleet.quiet()
    device.publish(topics.from_token(token.header.id), encode(Enrol(secret=token.header.secret, request=request())))
    fleet.quiet()
    (answer,) = (event for event in events if isinstance(event, Received))
    assert decode(Admission, answer.payload).device == "porch"


def test_refused_enrolments_and_words_of_revoked_devices_are_counted_and_said_with_their_name(world, said, gate, beside):
    fleet = world()
    fleet.start(gate=gate)
    topics = Topics("default")
    token, spare = beside.invite(), beside.invite("shed")
    beside.ask(token, request())
    fleet.join("porch")
    thief = fleet.broker.transport()
    thief.open("thief", None, lambda event: None)
    used, forged = beside.invite("attic"), encode(Enrol(secret="f" * 43, request=request()))
    beside.ask(used, request())
    for _ in range(3):
        thief.publish(topics.from_token(used.header.id), encode(Enrol(secret=used.header.secret, request=request())))
        thief.publish(topics.from_token(spare.header.id), forged)
        thief.publish(topics.from_token("0123"), forged)
    fleet.quiet()
    texts = [one["text"] for one in of(said, "warning", code="enrolment")]
    assert len(texts) == 3
    assert (
        "no certificate was issued by the token of device attic: this token was used already: if not by you, `cloud-server revoke attic`"
        in texts[0]
    )
    assert "the token of device shed: this token is not valid" in texts[1]
    assert "the token 0123: this token is not valid" in texts[2]
    beside.registry.revoke("porch")
    fleet.now += 2
    fleet.quiet()
    fleet.devices[0].tell("state", fleet.devices[0].state("ready"))
    fleet.quiet()
    fleet.server.handle(Stop())
    assert of(said, "complaints")[-1]["devices"] == {
        "attic": {"enrolment": 3}, "shed": {"enrolment": 3}, "0123": {"enrolment": 3}, "porch": {"revoked": 1},
    }  # fmt: skip
    assert "complaints: revoked 1" in overview(fleet.root / "server")


def test_what_a_server_behind_a_gate_announces_is_signed_by_its_authority(world, gate, beside):
    fleet = world()
    fleet.start(gate=gate)
    fleet.quiet()
    announced = fleet.broker.retained[Topics("default").run]
    believe = verifier(beside.authority.pem, "default")
    assert decode(Run, believe(announced)).epoch == fleet.course.epoch
