import base64

import pytest
from hypothesis import given, strategies

from lwfed.errors import ConfigError
from lwfed.wire.token import Header, Token, digest

HEADER = Header(host="garden.local", port=8883, fleet="default", device="porch", id="0123456789abcdef", secret="s" * 43)
TOKEN = Token(HEADER, bytes(range(12)))


def test_a_token_is_one_line_that_is_read_back():
    assert Token.parse(f"  {TOKEN}\n") == TOKEN
    assert set(str(TOKEN)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def test_a_token_is_written_as_ever():
    header = '{"host":"garden.local","port":8883,"fleet":"default","device":"porch","id":"0123456789abcdef","secret":"' + "s" * 43 + '"}'
    prefix, encoded, authority, check = str(TOKEN).split(".")
    assert base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode() == header
    assert (prefix, authority, check) == ("lwfed1", "AAECAwQFBgcICQoL", "b38fa832")


def test_its_secret_is_not_shown_by_accident():
    assert "sss" not in repr(TOKEN)


def test_a_secret_is_kept_as_its_sha_256():
    assert digest("s" * 43) == "d64b93c9f1b60eb338e5cb415d6a36bd920edd0e9b36f7ea5c730d0e10ff147f"


@pytest.mark.parametrize("cut", [0, 1, 6, 20, 200, -12, -1])
def test_a_part_of_a_token_is_none(cut):
    text = str(TOKEN)[:cut]
    with pytest.raises(ConfigError, match="not all of it") as caught:
        Token.parse(text)
    assert not text or text not in str(caught.value) or text in "lwfed1."


@given(strategies.text())
def test_whatever_is_pasted_is_a_token_or_explained(text):
    for pasted in (text, f"lwfed1.{text}", f"lwfed1.{text}.AAAA"):
        with pytest.raises(ConfigError, match="lwfed1"):
            Token.parse(pasted)
