"""What goes wrong for people: a clear message, the documented exit code, no traceback."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from paho.mqtt.publish import single as retained

from lwfed.cloud_server.cli import main as cloud_server
from lwfed.edge_agent.cli import main as edge_agent
from lwfed.tools.cli import main as lwfed

PROGRAMS = {"cloud-server": cloud_server, "edge-agent": edge_agent, "lwfed": lwfed}
MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


def run(name, *arguments):
    script = os.path.join(os.path.dirname(sys.executable), name)
    return subprocess.run([script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def fails(name, *arguments, code, says):
    result = run(name, *arguments)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.returncode == code


def call(name, *arguments):
    """As `run`, in this process."""
    return CliRunner().invoke(PROGRAMS[name], [*map(str, arguments)])


def fails_here(name, *arguments, code, says):
    """As `fails`, in this process: where a test of the program as one shows what becomes of that kind of error."""
    result = call(name, *arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.exit_code == code


@pytest.mark.parametrize(
    ("content", "says", "check"),
    [
        (None, "there is no folder", fails_here),
        ({}, "no images", fails_here),
        ({"notes.txt": b"hello"}, "no images", fails_here),
        ({"a.jpg": b"junk"}, "can be read", fails),
    ],
)
def test_a_folder_without_images(tmp_path, content, says, check):
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    check("edge-agent", "join", "mqtt://127.0.0.1:1", "--data", folder, "--state", tmp_path / "state", code=66, says=says)


def test_nobody_listens_at_the_broker_s_address(tmp_path, port):
    url = f"mqtt://127.0.0.1:{port}"
    fails("edge-agent", "join", url, "--data", "digits", "--state", tmp_path, "--wait", 2, code=69, says=f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("url", "check"), [("http://host", fails), ("mqtt://", fails_here), ("mqtt://host:port", fails_here), ("nonsense", fails_here)]
)
def test_an_address_that_is_none(tmp_path, url, check):
    check("edge-agent", "join", url, "--data", "digits", "--state", tmp_path, code=78, says="mqtt://")


def test_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fails("cloud-server", "serve", "--config", "demo", "--port", port, "--state", tmp_path, code=75, says=str(port))


def test_a_configuration_with_several_mistakes(tmp_path):
    fails(
        "cloud-server",
        "serve",
        "--config",
        "demo",
        "--set",
        "trian.lr=1",
        "--set",
        "train.lrr=2",
        "--state",
        tmp_path,
        code=78,
        says="2 problems",
    )


def test_a_state_directory_in_use(start, tmp_path, port):
    server = start("cloud-server", "serve", "--config", "demo", "--broker", "embedded", "--port", port, "--state", tmp_path, "--json")
    server.wait_for("run", status="started")
    fails("cloud-server", "serve", "--config", "demo", "--state", tmp_path, code=73, says="in use")


@pytest.mark.parametrize("name", ["edge-agent", "cloud-server", "lwfed"])
def test_help_names_every_command(name):
    result = run(name, "--help")
    assert result.returncode == 0
    commands = [line.split()[0] for line in result.stdout.partition("Commands:")[2].strip().splitlines()]
    for command in commands:
        assert call(name, command, "--help").exit_code == 0


def test_help_imports_no_heavy_library():
    for module in ("edge_agent", "cloud_server", "tools"):
        code = (
            f"import sys, json; from lwfed.{module}.cli import main\n"
            "try: main(['--help'])\nexcept SystemExit: pass\n"
            "print(json.dumps([name for name in ('torch', 'numpy', 'pydantic', 'paho', 'sqlalchemy') if name in sys.modules]))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert json.loads(result.stdout.splitlines()[-1]) == []


def publish(url, topic, payload):
    """Leave a retained message at the broker, as another program would."""
    host, _, port = url.removeprefix("mqtt://").partition(":")
    retained(topic, payload, hostname=host, port=int(port), qos=1, retain=True)


def test_a_server_of_another_protocol_version(start, tmp_path):
    server = start(
        "cloud-server", "serve", "--config", "demo", "--broker", "embedded", "--port", 0, "--state", tmp_path / "server", "--json"
    )
    url = server.wait_for("broker")["url"]
    newer = {"v": 9, "online": True, "epoch": 1, "protocol_min": 8, "protocol_max": 9, "motto": "unknown here"}
    publish(url, "lwfed/newer/srv/state", json.dumps(newer))
    fails("edge-agent", "join", url, "--fleet", "newer", "--data", "digits", "--state", tmp_path / "device", code=76, says="upgrade")


@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
def test_a_broker_that_refuses_us(tmp_path, port):
    (tmp_path / "passwords").touch(mode=0o600)
    passwd = os.path.join(os.path.dirname(MOSQUITTO).replace("sbin", "bin"), "mosquitto_passwd")
    subprocess.run([passwd, "-b", tmp_path / "passwords", "porch", "right"], check=True)
    me = f"user {getpass.getuser()}\n" if os.getuid() == 0 else ""
    (tmp_path / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {tmp_path}/passwords\n{me}")
    (tmp_path / "wrong").write_text("wrong\n")
    with subprocess.Popen([MOSQUITTO, "-c", tmp_path / "mosquitto.conf"], stderr=subprocess.DEVNULL) as broker:
        try:
            url, user = f"mqtt://127.0.0.1:{port}", ("--username", "porch", "--password-file", tmp_path / "wrong")
            fails("edge-agent", "join", url, *user, "--data", "digits", "--state", tmp_path / "a", code=77, says="--password-file")
            fails("cloud-server", "serve", "--config", "demo", "--broker", url, "--state", tmp_path / "b", code=77, says="--password-file")
        finally:
            broker.terminate()
