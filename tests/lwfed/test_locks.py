import os
import stat
from pathlib import Path

import pytest

from lwfed.errors import StateError
from lwfed.locks import in_use, locked_state, state_home


def test_a_second_holder_is_told_what_to_do(tmp_path):
    with locked_state(tmp_path / "state", "use another --state") as root:
        assert root.is_dir()
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        with pytest.raises(StateError, match=rf"in use.*pid {os.getpid()}.*use another --state"), locked_state(root, "use another --state"):
            pass
    with locked_state(root, ""):
        pass


def test_whether_a_place_is_in_use(tmp_path):
    assert not in_use(tmp_path / "state")
    with locked_state(tmp_path / "state", "") as root:
        assert in_use(root)
    assert not in_use(root)


def test_a_place_that_cannot_be_used_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="file"), locked_state(tmp_path / "file" / "state", ""):
        pass


@pytest.mark.parametrize(("value", "expected"), [("/var/state", Path("/var/state")), ("relative", None), ("", None), (None, None)])
def test_state_home(value, expected):
    environ = {} if value is None else {"XDG_STATE_HOME": value}
    assert state_home(environ) == (expected or Path.home() / ".local" / "state")
