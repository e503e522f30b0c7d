import pytest

from lwfed.cloud_server.course import Course
from lwfed.cloud_server.identity import accept
from lwfed.errors import StateError


def test_what_a_run_learns_cannot_change_and_is_named_key_by_key(tmp_path, tiny):
    with pytest.raises(StateError) as error:
        accept(tmp_path, tiny(), tiny("run.seed=5", "ssl.temperature=0.7", "rounds.quorum=0.9"))
    assert "run.seed: 0 before, 5 now" in str(error.value)
    assert "ssl.temperature" in str(error.value)
    assert "rounds.quorum" not in str(error.value)
    assert "--state" in str(error.value)


def test_how_a_run_proceeds_may_change_and_is_kept(tmp_path, tiny):
    easier = tiny("rounds.deadline_s=7", "transfer.window=2", "worker.linger_s=1")
    assert accept(tmp_path, tiny(), tiny()) == []
    for number, config in enumerate((tiny(), easier, easier)):
        course = Course(config, tmp_path, durable=False)
        assert len(course.changed) == (3 if number == 1 else 0)
        assert course.rules.deadline_s == config.rounds.deadline_s
        assert course.store.config == config
        course.store.close()
