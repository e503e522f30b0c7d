import contextlib
import sqlite3
import stat

import pytest

from lwfed.cloud_server.registry import FILE_NAME, Contact, Registry, next_epoch
from lwfed.errors import DiskTrouble, StateError


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def registry(tmp_path, clock):
    made = Registry(tmp_path, clock)
    yield made
    made.close()


def test_a_token_is_good_until_its_device_has_come_or_its_time_is_over(registry, clock):
    registry.invite("porch", "t1", "hash", 60)
    assert registry.of_token("t1").may_enrol(clock())
    assert not registry.of_token("t1").may_enrol(clock() + 60)
    assert not registry.device("porch").admitted
    registry.certify("t1", "request", "certificate")
    assert registry.device("porch").admitted
    assert registry.of_token("t1").may_enrol(clock())  # the answer may be lost
    registry.confirm("porch")
    assert not registry.of_token("t1").may_enrol(clock())
    assert registry.device("porch").admitted


def test_a_new_token_voids_the_one_before(registry, clock):
    registry.invite("porch", "t1", "hash", 60)
    registry.invite("porch", "t2", "other", 60)
    assert registry.of_token("t1") is None
    assert [one.token for one in registry.devices()] == ["t2"]
    with pytest.raises(KeyError):
        registry.certify("t1", "request", "certificate")


def test_a_certificate_is_issued_once(registry):
    registry.invite("porch", "t1", "hash", 60)
    registry.certify("t1", "request", "certificate")
    with pytest.raises(KeyError):
        registry.certify("t1", "another", "certificate")


def test_a_device_that_has_not_come_is_invited_anew_under_another_subject_each_time(registry):
    registry.invite("porch", "t1", "hash", 60)
    registry.certify("t1", "request", "certificate")
    users = [registry.device("porch").user]
    for token in ("t2", "t3"):
        registry.invite("porch", token, "hash", 60)
        assert not registry.device("porch").admitted
        users.append(registry.device("porch").user)
    assert users == ["porch", "t2.porch", "t3.porch"]
    registry.confirm("porch")  # what it said with the certificate before was still on its way
    registry.certify("t3", "request", "certificate")
    assert registry.device("porch").joined_s is None
    registry.confirm("porch")
    with pytest.raises(StateError, match="is enrolled"):
        registry.invite("porch", "t4", "hash", 60)


def test_a_long_name_leaves_room_for_the_token_in_a_subject(registry):
    name = 64 * "n"
    for token in (16 * "a", 16 * "b"):
        registry.invite(name, token, "hash", 60)
        registry.certify(token, "request", "certificate")
    assert registry.device(name).user == 16 * "b" + "." + 47 * "n"


@pytest.mark.parametrize("enrolled", [False, True])
def test_a_revoked_name_is_never_given_away_again(registry, clock, enrolled):
    registry.invite("porch", "t1", "hash", 60)
    if enrolled:
        registry.certify("t1", "request", "certificate")
    for _ in range(2):
        registry.revoke("porch")
        clock.now_s += 1
    device = registry.device("porch")
    assert (device.revoked_s, device.admitted, device.may_enrol(clock())) == (1000.0, False, False)
    with pytest.raises(KeyError):
        registry.certify("t1", "request", "certificate")
    with pytest.raises(StateError, match="was revoked"):
        registry.invite("porch", "t2", "hash", 60)


def test_revoking_a_stranger_names_those_that_there_are(registry):
    registry.invite("porch", "t1", "hash", 60)
    with pytest.raises(StateError, match=r"'shed'.*there are: porch"):
        registry.revoke("shed")


def test_the_revision_changes_with_what_another_process_does_and_only_then(registry, tmp_path):
    other = Registry(tmp_path)
    before = registry.revision
    assert registry.revision == before
    other.invite("porch", "t1", "hash", 60)
    assert registry.revision != before
    assert registry.device("porch") is not None
    other.close()


def test_who_reads_and_lingers_costs_a_start_at_most(registry, tmp_path):
    registry.invite("porch", "t1", "hash", 60)
    registry.certify("t1", "request", "certificate")
    registry._db.execute("PRAGMA busy_timeout=1")
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM devices").fetchall()
        with pytest.raises(DiskTrouble, match="database is locked"):
            registry.confirm("porch")
    registry.confirm("porch")
    assert registry.device("porch").joined_s is not None


def test_a_commit_that_fails_leaves_no_transaction_open(registry):
    registry._db.execute("CREATE TABLE other (name REFERENCES devices DEFERRABLE INITIALLY DEFERRED)")
    registry._db.execute("PRAGMA foreign_keys=ON")
    with pytest.raises(StateError), registry._transaction():
        registry._db.execute("INSERT INTO other VALUES ('nobody')")  # found at the commit
    registry.invite("porch", "t1", "hash", 60)


def test_the_latest_start_is_kept_and_none_is_of_an_earlier_one(registry, tmp_path):
    (tmp_path / "none").mkdir()
    assert (registry.epoch, next_epoch(tmp_path), next_epoch(tmp_path / "none")) == (0, 1, 1)
    registry.claim(2000)
    for late in (1999, 2000):
        with pytest.raises(StateError, match="start this one again"):
            registry.claim(late)
    assert (registry.epoch, next_epoch(tmp_path)) == (2000, 2001)
    assert not list((tmp_path / "none").iterdir())


def test_it_is_kept_for_its_owner_alone(registry, tmp_path):
    registry.contact = Contact("garden.local", 8883, "default")
    registry.contact = Contact("garden.lan", 8883, "default")
    again = Registry(tmp_path)
    assert again.contact == Contact("garden.lan", 8883, "default")
    again.close()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_an_unusable_file_is_explained(tmp_path):
    (tmp_path / FILE_NAME).write_text("no database at all, but long enough to be taken for one by its size" * 20)
    with pytest.raises(StateError, match="unusable"):
        Registry(tmp_path)


def test_who_only_opens_it_changes_nothing(tmp_path):
    first = Registry(tmp_path)
    before = first.revision
    Registry(tmp_path).close()
    assert first.revision == before
    first.close()
