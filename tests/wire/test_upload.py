"""The device's end of an upload, against messages written by hand."""

from __future__ import annotations

import itertools

import pytest

from lwfed.blobs import BlobStore
from lwfed.errors import ConfigError
from lwfed.wire.commands import Reconnect, Send
from lwfed.wire.messages import UP, Done, Fin, Grant, Miss, Offer, Refuse, Wait, encode
from lwfed.wire.report import MAX_CURVE, Reading
from lwfed.wire.retry import SUSPECT_S
from lwfed.wire.upload import LOSS_BYTES, REPORT_BYTES, Upload, fitting_chunk_bytes

from .uploads import CONTENT, TOPICS, TRAFFIC, make_offer, said


@pytest.fixture
def store(tmp_path) -> BlobStore:
    return BlobStore(tmp_path / "device", durable=False)


@pytest.fixture
def upload(store) -> Upload:
    return Upload(TOPICS, "d1", make_offer(store), store, seed=0)


def grant(upload: Upload, missing: str, window: int = 4) -> Grant:
    return Grant(contribution=upload._offer.contribution, worker="w0", missing=missing, window=window)


def test_from_offer_to_done(upload, store):
    assert upload.next_wakeup(5.0) == 5.0
    assert said(upload.poll(5.0, 4, TRAFFIC), UP) == [upload._offer]
    upload.on_grant(grant(upload, "0-5"))
    assert upload.state == "sending"
    first = upload.poll(5.1, 4, TRAFFIC)
    assert said(first, UP) == [0, 1, 2, 3]
    assert first[1] == Send(TOPICS.update_chunk("d1", "w0", upload._offer.contribution, 1), CONTENT[1024:2048])
    assert upload.poll(5.2, 0, TRAFFIC) == []
    assert upload.progress() == (4, 6)
    fin = Fin(contribution=upload._offer.contribution, traffic=TRAFFIC)
    assert said(upload.poll(5.3, 4, TRAFFIC), UP) == [4, 5]
    assert upload.next_wakeup(5.3) == 5.3
    assert said(upload.poll(5.3, 4, TRAFFIC), UP) == [fin], "by itself: what it says of the traffic has the last chunks in it"
    assert upload.state == "finishing"
    upload.on_miss(Miss(contribution=upload._offer.contribution, missing="2"))
    assert said(upload.poll(5.4, 4, TRAFFIC), UP) == [2]
    assert said(upload.poll(5.4, 4, TRAFFIC), UP) == [fin]
    upload.on_done(Done(contribution=upload._offer.contribution))
    assert upload.state == "done"
    assert upload.poll(99.0, 4, TRAFFIC) == []
    assert upload.next_wakeup(99.0) is None


def test_a_grant_of_nothing_goes_straight_to_fin(upload):
    upload.poll(0.0, 4, TRAFFIC)
    upload.on_grant(grant(upload, ""))
    assert said(upload.poll(0.1, 0, TRAFFIC), UP) == [Fin(contribution=upload._offer.contribution, traffic=TRAFFIC)]


def test_the_window_is_the_servers(upload):
    upload.on_grant(grant(upload, "0-5", window=2))
    assert upload.window == 2
    assert said(upload.poll(0.0, 50, TRAFFIC), UP) == [0, 1]


def test_wait_puts_the_next_offer_off(upload):
    upload.poll(0.0, 4, TRAFFIC)
    upload.on_wait(Wait(contribution=upload._offer.contribution, retry_s=30))
    assert upload.poll(1.0, 4, TRAFFIC) == []
    assert upload.next_wakeup(1.0) == 31.0
    assert said(upload.poll(31.0, 4, TRAFFIC), UP) == [upload._offer]


def test_silence_repeats_the_question_and_after_half_a_minute_doubts_the_connection(upload):
    now, seen = 0.0, []
    while Reconnect not in (kinds := [type(item) for item in said(upload.poll(now, 4, TRAFFIC), UP)]):
        seen.append((now, kinds))
        assert upload.next_wakeup(now) > now
        now = upload.next_wakeup(now)
    assert len(seen) >= 3
    assert [kinds for _, kinds in seen] == [[Offer]] * len(seen)
    assert kinds == [Reconnect, Offer]
    assert SUSPECT_S <= now <= 100


def test_while_chunks_are_leaving_an_answer_is_not_missed(upload):
    """Of a slow link: `fin` waits behind the last chunks for longer than an answer takes."""
    fin = Fin(contribution=upload._offer.contribution, traffic=TRAFFIC)
    upload.on_grant(grant(upload, "0-3"))
    upload.poll(0.0, 4, TRAFFIC)
    assert said(upload.poll(0.1, 1, TRAFFIC), UP) == [fin], "at once, although room has grown"
    for room, now in ((2, 3.0), (3, 6.0), (4, 9.0)):
        assert upload.poll(now, room, TRAFFIC) == []
    assert upload.next_wakeup(9.0) > 12.0
    assert said(upload.poll(15.0, 4, TRAFFIC), UP) == [fin], "no more has left, and nobody has answered"


def test_answers_to_repeated_questions_send_nothing_twice(upload):
    """After a link has stalled, what was asked again meanwhile is answered as often."""
    fin = Fin(contribution=upload._offer.contribution, traffic=TRAFFIC)
    miss = Miss(contribution=upload._offer.contribution, missing="2")
    upload.poll(0.0, 4, TRAFFIC)
    assert said(upload.poll(9.0, 4, TRAFFIC), UP) == [upload._offer]
    for _ in range(2):
        upload.on_grant(grant(upload, "0-3"))
    assert said(upload.poll(9.1, 4, TRAFFIC), UP) == [0, 1, 2, 3]
    upload.on_grant(grant(upload, "0-3"))
    assert said(upload.poll(9.2, 4, TRAFFIC), UP) == [fin]
    assert said(upload.poll(19.0, 4, TRAFFIC), UP) == [fin]
    upload.on_miss(miss)
    assert said(upload.poll(19.1, 4, TRAFFIC), UP) == [2]
    assert said(upload.poll(19.2, 4, TRAFFIC), UP) == [fin]
    upload.on_miss(miss)
    assert said(upload.poll(19.3, 4, TRAFFIC), UP) == [], "an answer to the second of three"
    upload.on_miss(miss)
    assert said(upload.poll(19.4, 4, TRAFFIC), UP) == [2], "it was lost once more"


def test_a_grant_of_another_receiver_counts_at_any_time(upload):
    upload.on_grant(grant(upload, "0-3"))
    upload.poll(0.0, 4, TRAFFIC)
    upload.on_grant(Grant(contribution=upload._offer.contribution, worker="w1", missing="0", window=4))
    assert upload.poll(0.1, 4, TRAFFIC)[0].topic == TOPICS.update_chunk("d1", "w1", upload._offer.contribution, 0)


def test_a_link_that_takes_nothing_is_given_up(upload):
    upload.on_grant(grant(upload, "0-5"))
    assert upload.poll(0.0, 0, TRAFFIC) == []
    assert upload.next_wakeup(0.0) == 60.0
    assert isinstance(upload.poll(60.0, 0, TRAFFIC)[0], Reconnect)
    assert upload.state == "offering"


def patience(upload: Upload, now: float, missing: str) -> float:
    """With a link over which the chunks that are granted do not leave."""
    upload.poll(now, 4, TRAFFIC)
    upload.on_grant(grant(upload, missing))
    assert said(upload.poll(now, 4, TRAFFIC), UP)[0] == int(missing[0])
    until = upload.next_wakeup(now)
    assert upload.poll(until - 1.0, 0, TRAFFIC) == []
    (given_up,) = upload.poll(until, 0, TRAFFIC)
    assert "transfer.chunk_bytes" in given_up.reason
    return until - now


def test_a_link_that_is_given_up_gets_twice_the_patience(upload):
    assert [patience(upload, 10_000.0 * number, "0-5") for number in range(7)] == [60, 120, 240, 480, 960, 1800, 1800]
    assert patience(upload, 80_000.0, "1-5") == 1800, "a link that was so slow is so still"


def test_what_leaves_renews_patience(upload):
    patience(upload, 0.0, "0-5")
    upload.poll(100.0, 4, TRAFFIC)
    upload.on_grant(grant(upload, "0-5"))
    upload.poll(100.0, 4, TRAFFIC)
    for now in (180.0, 299.0, 418.0):
        upload.poll(now, 0, TRAFFIC)
        assert not any(isinstance(command, Reconnect) for command in upload.poll(now, 1, TRAFFIC))


def test_a_question_is_not_repeated_before_it_has_left(upload):
    """It would not overtake the chunks before it, and neither would a new connection carry them."""
    fin = Fin(contribution=upload._offer.contribution, traffic=TRAFFIC)
    upload.on_grant(grant(upload, "0-3"))
    upload.poll(0.0, 4, TRAFFIC)
    assert said(upload.poll(0.0, 0, TRAFFIC), UP) == [fin]
    for now, room in ((30.0, -1), (59.0, 0), (118.0, 1), (170.0, 2), (220.0, 3)):
        assert upload.poll(now, room, TRAFFIC) == []
    assert upload.poll(270.0, 4, TRAFFIC) == []
    assert said(upload.poll(upload.next_wakeup(270.0), 4, TRAFFIC), UP) == [fin], "no more has left, and nobody has answered"


def test_a_server_that_never_answers_is_asked_ever_less_often_and_then_by_a_new_connection(upload):
    """Also where the transport is seen to be busy with each question before it has left."""
    asked, reconnected, left_at = [], [], 0.0
    for step in range(1800):
        now = step / 2
        commands = upload.poll(now, 4 if now >= left_at else 3, TRAFFIC)
        reconnected += [now for command in commands if isinstance(command, Reconnect)]
        if said(commands, UP):
            asked.append(now)
            left_at = now + 0.6
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert 30 <= reconnected[0] <= 60
    assert len(asked) < 30
    assert gaps[4] > 4 * gaps[0]


def test_after_a_reset_it_offers_again(upload):
    upload.on_grant(grant(upload, "0-5"))
    upload.poll(0.0, 4, TRAFFIC)
    upload.reset()
    assert said(upload.poll(0.1, 4, TRAFFIC), UP) == [upload._offer]


def test_a_refused_digest_is_tried_three_times_and_others_never(upload, store):
    refusal = Refuse(contribution=upload._offer.contribution, code="digest", reason="damaged")
    for _ in range(3):
        upload.on_refuse(refusal)
        assert upload.state == "offering"
    upload.on_refuse(refusal)
    assert upload.state == "refused"
    other = Upload(TOPICS, "d1", make_offer(store), store, seed=0)
    final = Refuse(contribution=other._offer.contribution, code="stale", reason="over")
    other.on_refuse(final)
    assert (other.state, other.refusal) == ("refused", final)
    other.reset()
    other.on_grant(grant(other, "0"))
    assert other.state == "refused"
    assert other.poll(0.0, 4, TRAFFIC) == []


def test_messages_about_another_contribution_or_out_of_bounds_change_nothing(upload):
    other = "ff" * 16
    upload.on_grant(Grant(contribution=other, worker="w0", missing="0", window=4))
    upload.on_wait(Wait(contribution=other, retry_s=9))
    upload.on_miss(Miss(contribution=other, missing="0"))
    upload.on_done(Done(contribution=other))
    upload.on_refuse(Refuse(contribution=other, code="stale", reason=""))
    upload.on_refuse(Refuse(contribution=None, code="stale", reason=""))
    upload.on_grant(grant(upload, "0-6"))
    assert upload.state == "offering"
    assert said(upload.poll(0.0, 4, TRAFFIC), UP) == [upload._offer]


@pytest.mark.parametrize(
    ("size", "limit", "fitting"),
    [(5_000_000, None, 122_880), (5_000_000, 1_000_000, 122_880), (5_000_000, 50_000, 49_488), (60_000_000, 122_880, 122_368)],
)
def test_chunks_are_cut_for_what_the_broker_takes(size, limit, fitting):
    assert fitting_chunk_bytes(size, 122_880, 3, limit) == fitting


@pytest.mark.parametrize(("size", "limit"), [(1, 512), (1, 13_000), (5_000_000, 14_000), (100_000_000, 60_000)])
def test_the_packets_that_an_update_needs_are_named_and_suffice(size, limit):
    with pytest.raises(ConfigError, match=f"packets of {limit} bytes") as refusal:
        fitting_chunk_bytes(size, 122_880, 3, limit)
    needed = int(str(refusal.value).split()[-1])
    assert fitting_chunk_bytes(size, 122_880, 3, needed) == 122_880


def test_an_update_that_no_broker_could_carry_is_not_blamed_on_it():
    with pytest.raises(ConfigError, match="take a smaller model"):
        fitting_chunk_bytes(5_000_000, 1024, 3, 100_000)


def test_the_largest_offer_is_as_large_as_is_reckoned(store):
    reading = Reading(t_s=12345.678, rss_mb=1234.56, uss_mb=1234.56, swap_mb=1234.56, available_mb=12345.67)
    small = make_offer(store)
    memory = small.report.memory.model_copy(update={"curve": (reading,) * MAX_CURVE})
    for losses in ((), (-1.2345678901234567,) * 100):
        report = small.report.model_copy(update={"memory": memory, "losses": losses})
        reckoned = REPORT_BYTES + LOSS_BYTES * len(losses)
        assert reckoned * 0.8 < len(encode(small.model_copy(update={"report": report}))) < reckoned
