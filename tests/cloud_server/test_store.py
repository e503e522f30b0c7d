from dataclasses import replace

import pytest

from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import FILE_NAME, Begun, Contribution, Judgement, Scores, open_store
from lwfed.errors import StateError
from lwfed.tools.faults.store import Kept, MemoryStore
from lwfed.wire import messages
from lwfed.wire.report import Traffic

from .fleets import HELLO, start


@pytest.fixture(params=["sqlite", "postgresql", "memory"])
def opened(tmp_path, request):
    """Opens the store; once more as well, as a server does that was started again."""
    stores, kept = [], Kept()
    address = request.getfixturevalue("postgres").address() if request.param == "postgresql" else None

    def opened(now=1000.0, run="demo"):
        def clock():
            return now

        in_memory = request.param == "memory"
        stores.append(MemoryStore(kept, run, clock) if in_memory else open_store(tmp_path, run, address, clock, durable=False))
        return stores[-1]

    yield opened
    for one in stores:
        one.close()


@pytest.fixture
def store(opened):
    return opened()


@pytest.fixture
def contribution(make_report):
    def contribution(id, participant=0, stage=1, round=1, down=0, up=0, **report):
        return Contribution(id, stage, round, participant, "b" * 64, 9, make_report(**report), Traffic(down=down, up=up))

    return contribution


def test_a_run_is_begun_once_and_taken_up_again(store, tiny, opened):
    assert store.config is None
    first = store.begin(tiny())
    assert first == Begun(first.id, State(), 1000, resumed=False)
    with store.step(State(phase="waiting", chosen=(0, 1))):
        pass
    store.close()
    again = opened(900.0)  # clocks are set back at times
    assert again.begin(tiny()) == Begun(first.id, State(phase="waiting", chosen=(0, 1)), 1001, resumed=True)
    assert again.config == tiny()


def test_a_new_store_is_of_a_later_epoch_than_any_start_of_an_earlier_one(tmp_path, tiny):
    epochs = []
    for name, starts in (("first", 3), ("second", 1)):
        (tmp_path / name).mkdir()
        for _ in range(starts):
            store = open_store(tmp_path / name, "demo", clock=lambda: 1000.9 + len(epochs), durable=False)
            epochs.append(store.begin(tiny()).epoch)
            store.close()
    assert epochs == [1000, 1001, 1002, 1003]


def test_runs_of_one_name_have_ids_of_their_own_that_devices_can_read(tmp_path, tiny):
    ids = []
    for name in ("n", "n", "n" * 64):
        (tmp_path / str(len(ids))).mkdir()
        store = open_store(tmp_path / str(len(ids)), name, durable=False)
        ids.append(store.begin(tiny(f"run.name={name}")).id)
        store.close()
    assert len(set(ids)) == 3
    assert [messages.Task(run=id, stage=1, round=1, participant=0).run for id in ids] == ids


def test_a_start_is_of_the_least_epoch_that_is_asked_for_or_a_later_one(opened, tiny):
    epochs = []
    for least in (2000, 2000, 3000, 0):
        store = opened(1000.0)
        epochs.append(store.begin(tiny(), least).epoch)
        store.close()
    assert epochs == [2000, 2001, 3000, 3001]


def test_participant_numbers_follow_admission_and_stay(store, tiny):
    store.begin(tiny())
    assert [store.admit(name, HELLO) for name in ("b", "a", "b", "c")] == [(0, True), (1, True), (0, False), (2, True)]
    assert [(device.participant, device.id) for device in store.devices()] == [(0, "b"), (1, "a"), (2, "c")]


def test_a_greeting_that_says_nothing_new_is_written_once_a_minute(opened, tiny):
    def greeted(now, hello=HELLO):
        store = opened(now)
        store.admit("a", hello)
        return store.devices()[0].seen_s, store.devices()[0].hello

    opened().begin(tiny())
    assert greeted(1000.0) == (1000.0, HELLO)
    assert greeted(1059.0) == (1000.0, HELLO)
    assert greeted(1060.0) == (1060.0, HELLO)
    changed = HELLO.model_copy(update={"start": start(2)})
    assert greeted(1061.0, changed) == (1061.0, changed)
    assert greeted(900.0, changed) == (900.0, changed)  # clocks are set back at times


def test_complaints_are_kept_by_device_and_replaced(store, opened, tiny):
    store.begin(tiny())
    for name in ("a", "b", "c"):
        store.admit(name, HELLO)
    store.note_complaints({"a": {"flood": 900}, "b": {"stale": 1}})
    store.note_complaints({"a": {"flood": 901, "stale": 2}})
    store.admit("a", HELLO.model_copy(update={"start": start(2)}))
    store.close()
    assert [device.complaints for device in opened().devices()] == [{"flood": 901, "stale": 2}, {"stale": 1}, {}]


def test_what_one_event_causes_is_written_together_or_not_at_all(store, tiny, contribution):
    store.begin(tiny())
    store.admit("a", HELLO)

    def interrupted():
        with store.step(State(phase="training")) as step:
            step.begin_round(1, 1, (0,))
            step.contribute(contribution("c1"))
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="power"):
        interrupted()
    assert store.state.phase == "preparing"
    assert store.contributions() == []
    assert store.rounds() == []


def test_a_contribution_counts_once(store, tiny, contribution):
    store.begin(tiny())
    store.admit("a", HELLO)
    with store.step(State()) as step:
        step.begin_round(1, 1, (0,))
        step.contribute(contribution("c1", loss=3.0))
    assert store.has_contribution("c1")
    assert not store.has_contribution("c2")
    for id in ("c1", "c2"):
        with pytest.raises(StateError, match=r"(?i)unique"), store.step(State()) as step:
            step.contribute(contribution(id))
    assert store.contributions() == [contribution("c1", loss=3.0)]


def test_a_contribution_of_nobody_is_refused_by_foreign_keys(store, tiny, contribution):
    store.begin(tiny())
    with pytest.raises(StateError, match=r"(?i)foreign key"), store.step(State()) as step:
        step.contribute(contribution("c1", participant=4))


def test_the_loss_of_a_round_is_weighted_by_images(store, tiny, contribution):
    store.begin(tiny())
    for name in ("a", "b"):
        store.admit(name, HELLO)
    with store.step(State()) as step:
        step.begin_round(1, 1, (0, 1))
        step.contribute(contribution("c1", images=30, loss=1.0))
        step.contribute(contribution("c2", participant=1, images=10, loss=5.0))
        step.close_round(1, 1)
    assert store.loss(1, 1) == 2.0
    assert store.loss(1, 2) is None
    assert store.stage_began_s(1) == 1000.0


def test_results_and_the_last_checkpoint_of_each_stage(store, tiny):
    store.begin(tiny())
    with store.step(State(phase="finished")) as step:
        step.evaluated(1, "trained", Scores(0.5, None))
        step.evaluated(1, "trained", Scores(0.6, None))
        for round in (1, 2):
            step.checkpoint(1, round, {"stem": f"blob{round}"})
        step.checkpoint(2, 1, {"stem": "blob3"})
    assert store.scores() == {(1, "trained"): Scores(0.6, None)}
    assert store.checkpoints() == {(1, 2): {"stem": "blob2"}, (2, 1): {"stem": "blob3"}}
    assert store.times == (1000.0, 1000.0)


def test_a_round_knows_whose_updates_were_left_out(store, opened, tiny):
    store.begin(tiny())
    with store.step(State()) as step:
        for round in (1, 2):
            step.begin_round(1, round, (0, 1, 2))
        step.leave_out(1, 2, (0, 2))
    store.close()
    assert [(row.round, row.left_out) for row in opened().rounds()] == [(1, []), (2, [0, 2])]


def test_judgements_of_each_attempt_and_a_checkpoint_that_is_forgotten(store, tiny):
    store.begin(tiny())
    with store.step(State(phase="stopped")) as step:
        step.judged(1, 1, Judgement(True, 0.01, 1.5))
        step.judged(1, 2, Judgement(False, 0.9, 40.0))
        step.checkpoint(1, 2, {"stem": "blob"})
        step.forget_checkpoint(1)
    assert store.judgements() == {(1, 1): Judgement(True, 0.01, 1.5), (1, 2): Judgement(False, 0.9, 40.0)}
    assert store.checkpoints() == {}
    assert store.times == (1000.0, 1000.0)


def test_a_file_that_is_no_store_is_explained(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StateError, match="cannot be used"):
        open_store(tmp_path, "demo")


def test_figures_of_a_stage(store, tiny, contribution):
    store.begin(tiny())
    reports = [
        contribution("1", 0, stage=1, down=100, up=10, peak_mb=300.0),
        contribution("2", 1, stage=1, down=300, up=30, peak_mb=310.0),
        contribution("3", 0, stage=2, round=1, down=150, up=15, peak_mb=400.0),
        contribution("4", 0, stage=2, round=2, down=180, up=20, peak_mb=350.0),
        contribution("5", 1, stage=2, down=40, up=4, peak_mb=1.0),  # its journal was lost
        contribution("6", 2, stage=3, down=7, up=7, peak_mb=1.0),
    ]
    for name in ("a", "b", "c"):
        store.admit(name, HELLO)
    with store.step(State()) as step:
        for one in reports:
            step.begin_round(one.stage, one.round, ())
            step.contribute(one)
    first, second = store.figures(1), store.figures(2)  # means of all three devices
    assert (first.bytes_down, first.bytes_up, first.worker_peak_mb, first.worker_baseline_mb) == (
        133,
        13,
        310,
        200,
    )
    assert (second.bytes_down, second.bytes_up, second.worker_peak_mb) == (40, 5, 400)
    assert store.figures(3).bytes_down == 2
    assert store.figures(4) is None


def test_numbers_and_words_of_devices_are_kept_whatever_they_are(store, tiny, contribution):
    store.begin(tiny())
    hello = HELLO.model_copy(update={"machine": "a\x00b\U0001f600", "images": 2**53 - 1})
    store.admit("a", hello)
    with store.step(State(unfit={0: "no\x00\U0001f600"})) as step:
        step.begin_round(1, 1, (0,))
        step.contribute(contribution("c1", images=2**53 - 1, down=2**53 - 1, up=2**53 - 1))
    assert store.devices()[0].hello == hello
    assert store.state.unfit == {0: "no\x00\U0001f600"}
    assert store.contributions()[0].traffic == Traffic(down=2**53 - 1, up=2**53 - 1)
    assert store.loss(1, 1) == 1.0


def test_images_of_two_thousand_devices_add_up_whatever_they_say(store, tiny, contribution):
    store.begin(tiny())
    with store.step(State()) as step:
        step.begin_round(1, 1, (0, 1))
    for participant, name in enumerate("ab"):
        store.admit(name, HELLO)
        one = contribution(name, participant, loss=participant)
        with store.step(State()) as step:  # as a thousand do together, each with the most that a report may say
            step.contribute(replace(one, report=one.report.model_copy(update={"images": 2**62})))
    assert store.loss(1, 1) == 0.5


def test_figures_and_losses_are_not_taken_from_whole_reports(store, tiny, contribution, monkeypatch):
    store.begin(tiny())
    store.admit("a", HELLO)
    with store.step(State()) as step:
        step.begin_round(1, 1, (0,))
        step.contribute(contribution("1", loss=2.0, down=3))
    monkeypatch.setattr("lwfed.cloud_server.store.records.Contribution.of_row", None)
    assert store.loss(1, 1) == 2.0
    assert store.figures(1).bytes_down == 3
