import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lwfed.cli import Connection, Program, connection_options, json_option, setting_option
from lwfed.cloud_server.cli import main as cloud_server
from lwfed.cloud_server.registry import Registry
from lwfed.edge_agent.cli import main as edge_agent
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


def test_a_code_does_not_depend_on_who_listens():
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "lwfed.edge_agent.cli", "join", "mqtt://127.0.0.1:1", "--data", "/nowhere"]
        assert subprocess.run(words, stdout=full, stderr=full).returncode == 66


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


TOKEN = "lwfed1.eyJob3N0IjoiZ2FyZGVuIiwic2VjcmV0IjoieCJ9.MIIBaTCCAQ-_x.0123abcd"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (edge_agent, ["join", TOKEN, "--data", "digits"]),
        (edge_agent, ["join", TOKEN[3:], "--data", "digits"]),
        (edge_agent, ["join", "mqtt://localhost", "--data", TOKEN]),
        (edge_agent, ["join", "mqtt://localhost", "--data", "digits", "--name", TOKEN]),
        (edge_agent, ["doctor", f"mqtts://{TOKEN}"]),
        (edge_agent, ["enrol", TOKEN, TOKEN]),
        (edge_agent, ["enrol", f"{TOKEN}0"]),
        (edge_agent, [TOKEN]),
        (cloud_server, ["serve", "--config", "demo", "--broker", TOKEN]),
        (cloud_server, ["serve", "--config", "demo", "--listen", TOKEN]),
        (cloud_server, ["serve", "--config", TOKEN]),
        (cloud_server, ["serve", "--config", "demo", "--set", f"run.name={TOKEN}"]),
        (cloud_server, ["status", "--state", TOKEN]),
        (cloud_server, ["revoke", TOKEN]),
    ],
)
def test_no_error_repeats_a_token(program, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "cloud-server" / "_authority"
    folder.mkdir(parents=True)
    with closing(Registry(folder)):
        result = CliRunner().invoke(program, words)
    assert result.exit_code not in (0, 1)
    assert "eyJ" not in result.output


def test_who_joins_by_a_token_hears_how_to_enrol_and_names_like_it_are_names():
    result = CliRunner().invoke(edge_agent, ["join", TOKEN, "--data", "digits"])
    assert result.stderr.splitlines() == [
        "error: this is a token, not the address of a broker: `edge-agent enrol -` takes it, from its standard input"
    ]
    assert BrokerAddress.parse("mqtts://lwfed1.example.com").host == "lwfed1.example.com"
