from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lwfed.cli import Connection, Program, connection_options, json_option, setting_option
from lwfed.errors import ConfigError, LwfedError, Refused
from lwfed.transport.address import BrokerAddress
from lwfed.transport.mqtt import MqttTransport


@click.group(cls=Program)
def program():
    pass


@program.command()
@click.argument("error")
def fail(error):
    raise {"refused": Refused, "plain": LwfedError}[error]("it went wrong: do this")


@program.command()
@setting_option
@connection_options
@json_option
def show(settings, connection, as_json):
    click.echo(repr((settings, connection, as_json)))


@pytest.mark.parametrize(("error", "code"), [("refused", 77), ("plain", 1)])
def test_errors_end_in_words_with_their_code(error, code):
    result = CliRunner().invoke(program, ["fail", error])
    assert (result.exit_code, result.stderr, result.stdout) == (code, "error: it went wrong: do this\n", "")


@pytest.mark.parametrize("url", ["mqtt://192.0.2.1", "mqtt://pi.local:1884"])
def test_a_plain_way_to_another_machine_must_be_wanted(url):
    address = BrokerAddress.parse(url)
    with pytest.raises(ConfigError, match=r"without TLS.*mqtts://.*--insecure"):
        Connection().transport(address)
    Connection(insecure=True).transport(address)


@pytest.mark.parametrize("url", ["mqtts://192.0.2.1", "mqtt://localhost", "mqtt://127.0.0.5", "mqtt://[::1]"])
def test_no_such_wish_is_needed_with_tls_or_on_this_machine(url):
    assert isinstance(Connection().transport(BrokerAddress.parse(url)), MqttTransport)


def test_options_arrive_as_values():
    result = CliRunner().invoke(program, ["show", "--set", "a.b=1", "--set", "c.d=2", "--username", "me", "--ca", "ca.pem", "--json"])
    assert result.output.strip() == repr((("a.b=1", "c.d=2"), Connection(username="me", ca=Path("ca.pem")), True))


def test_commands_are_listed_in_their_order():
    output = CliRunner().invoke(program, ["--help"]).output
    assert output.index("fail") < output.index("show")


def test_files_for_tls_without_tls_are_a_mistake():
    with pytest.raises(ConfigError, match="mqtts://"):
        Connection(ca=Path("ca.pem")).transport(BrokerAddress("host", 1883))


def test_a_password_file_that_cannot_be_read_is_a_mistake():
    with pytest.raises(ConfigError, match="nowhere"):
        Connection(username="me", password_file=Path("nowhere")).transport(BrokerAddress("localhost", 1883))
