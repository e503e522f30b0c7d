import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from lwfed.cli import Connection
from lwfed.edge_agent import doctor
from lwfed.edge_agent.cli import main, megabytes
from lwfed.edge_agent.identity import Access, Identity
from lwfed.errors import Refused, Unreachable
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Disconnected
from lwfed.transport.memory import MemoryBroker
from lwfed.transport.mqtt_errors import explain_failure


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from click.testing import CliRunner; from lwfed.edge_agent.cli import main;"
        "assert CliRunner().invoke(main, ['join', '--help']).exit_code == 0;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'PIL', 'psutil', 'paho') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mqtt://localhost:1", "--data", "/nowhere"], 66, "no folder '/nowhere'"),
        (["mqtt://localhost:1", "--data", "digits", "--wait", "0.2"], 69, "localhost:1"),
        (["http://localhost", "--data", "digits"], 78, "mqtt://"),
        (["mqtt://localhost", "--data", "digits", "--fleet", "a/b"], 78, "--fleet"),
        (["mqtt://localhost", "--data", "digits", "--ca", "x.pem"], 78, "mqtts://"),
        (["mqtt://localhost"], 2, "--data"),
        (["mqtt://pi.local", "--data", "digits"], 78, "--insecure"),
    ],
)
def test_what_makes_joining_impossible_ends_with_its_code(tmp_path, arguments, code, message):
    result = run("join", *arguments, "--state", str(tmp_path / "state"))
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_looks_for_images_ends_it_cleanly(tmp_path, monkeypatch, number):
    from lwfed.edge_agent import agent

    def interrupted(spec):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(agent, "open_source", interrupted)
    result = run("join", "mqtt://localhost:1", "--data", "digits", "--state", str(tmp_path))
    assert (result.exit_code, result.output) == (0, "")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("command", [["join", "mqtt://localhost:1", "--data", "digits"], ["doctor"]])
def test_an_empty_state_is_a_usage_error(command):
    assert run(*command, "--state", "").exit_code == 2


def test_an_empty_folder_is_refused_before_connecting(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("join", "mqtt://localhost:1", "--data", str(tmp_path / "empty"), "--state", str(tmp_path / "state"))
    assert result.exit_code == 66
    assert "no images" in result.stderr


def test_a_plain_connection_beyond_this_machine_must_be_wanted(tmp_path):
    command = ["join", "mqtt://192.0.2.1", "--data", "/nowhere", "--state", str(tmp_path)]
    refused = run(*command)
    assert (refused.exit_code, "--insecure" in refused.stderr) == (78, True)
    assert "--insecure" not in run(*command, "--insecure").stderr


def test_a_device_that_is_not_enrolled_needs_an_address(tmp_path):
    result = run("join", "--data", "digits", "--state", str(tmp_path))
    assert (result.exit_code, "edge-agent enrol" in result.stderr) == (78, True)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "_torch", lambda: iter([doctor.Check("torch.works", "ok", "torch works")]))


@pytest.mark.usefixtures("quick")
def test_doctor_passes_here_and_lists_stable_ids(tmp_path):
    result = run("doctor", "--data", "digits", "--state", str(tmp_path / "not" / "yet"), "--json")
    checks = {check["id"]: check for check in map(json.loads, result.stdout.splitlines())}
    assert set(checks) == {"device.python", "device.memory", "device.disk", "torch.works", "data.readable"}
    assert result.exit_code == 0


@pytest.mark.usefixtures("quick")
def test_doctor_fails_with_advice(tmp_path):
    result = run("doctor", "mqtt://localhost:1", "--data", str(tmp_path), "--state", str(tmp_path))
    assert result.exit_code == 1
    assert "no images in" in result.stdout
    assert "is the broker running" in result.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("state", ["n" * 300, "file/below"])
def test_doctor_says_that_a_state_cannot_be(tmp_path, state):
    (tmp_path / "file").touch()
    result = run("doctor", "--state", str(tmp_path / state))
    assert (result.exit_code, "cannot hold the state" in result.stdout) == (1, True)


@pytest.mark.usefixtures("quick")
def test_doctor_says_that_a_host_cannot_be(tmp_path):
    result = run("doctor", "mqtts://a..b", "--state", str(tmp_path))
    assert (result.exit_code, "a..b has no address" in result.stdout) == (1, True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_goes_on_where_a_file_of_tls_is_missing(tmp_path, as_json):
    result = run("doctor", "mqtts://localhost:1", "--ca", str(tmp_path / "none.pem"), "--state", str(tmp_path), *["--json"] * as_json)
    assert (result.exit_code, result.stderr) == (1, "")
    if as_json:
        found = {check["id"]: check["status"] for check in map(json.loads, result.stdout.splitlines())}
        assert found == {
            **dict.fromkeys(("device.python", "device.memory", "device.disk", "torch.works", "broker.dns"), "ok"),
            **dict.fromkeys(("broker.access", "broker.tcp"), "fail"),
        }
    assert f"cannot use {tmp_path / 'none.pem'} for TLS" in result.stdout


@pytest.mark.usefixtures("quick")
def test_doctor_says_that_the_certificate_of_an_enrolled_device_is_damaged(tmp_path):
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "identity.json").write_text(
        Identity(device="porch", fleet="default", broker="mqtts://localhost:1").model_dump_json()
    )
    result = run("doctor", "--state", str(tmp_path))
    assert result.exit_code == 1
    assert re.search(r"torch works\nbroker\n  FAIL  cannot use .*certificate\.pem", result.stdout)


@pytest.mark.usefixtures("quick")
def test_doctor_lets_no_plain_connection_beyond_this_machine_be_made_unless_it_is_wanted(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(doctor, "_mqtt", lambda *_: tried.append("mqtt") or doctor.Check("broker.mqtt", "ok", ""))
    monkeypatch.setattr(doctor.socket, "create_connection", lambda *_: socket.socket())
    command = ["doctor", "mqtt://192.0.2.1", "--state", str(tmp_path)]
    refused = run(*command)
    assert (refused.exit_code, "--insecure" in refused.stdout, tried) == (1, True, [])
    wanted = run(*command, "--insecure")
    assert (wanted.exit_code, "--insecure" in wanted.stdout, tried) == (0, False, ["mqtt"])


def test_doctor_finds_a_torch_that_does_not_fit_numpy():
    unfit = "import torch\ndef from_numpy(array): raise RuntimeError('Numpy is not available')\ntorch.from_numpy = from_numpy\n"
    problem = doctor._probe(unfit + doctor.TORCH)[1]
    assert problem == "RuntimeError: Numpy is not available"
    assert "numpy<2" in doctor._torch_advice(problem)


def test_doctor_reads_the_signal_of_a_build_for_another_processor():
    _, problem = doctor._probe("import os; os.kill(os.getpid(), 4)")
    assert "another processor" in problem
    assert doctor._probe("raise ValueError('so')")[1] == "ValueError: so"
    assert doctor._probe("print(7)") == ("7", None)


def test_doctor_tries_torch_in_a_process_of_its_own():
    checks = {check.id: check for check in doctor._torch()}
    assert checks["torch.works"].status == "ok"
    assert checks.get("torch.torchvision", checks["torch.works"]).status in ("ok", "warn")


@pytest.mark.parametrize(
    ("code", "status", "text", "advice"),
    [
        ("print('0.28.0')", "ok", "`import torchvision` works: 0.28.0", ""),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "warn", "fails", "lwfed itself does not need that"),
        ("raise ImportError('libjpeg.so')", "warn", "fails as it is installed: ImportError: libjpeg.so", "for data sets by name only"),
    ],
)
def test_doctor_says_whether_torchvision_can_be_imported(monkeypatch, code, status, text, advice):
    monkeypatch.setattr(doctor, "TORCHVISION", code)
    check = doctor._torchvision("2.13.0+cpu")
    assert (check.id, check.status) == ("torch.torchvision", status)
    assert text in check.text
    assert advice in check.advice
    assert ("matches torch 2.13.0+cpu" in check.advice) == (status == "warn")


@pytest.mark.parametrize(
    ("installed", "code", "status", "text", "advice"),
    [
        (False, "", "ok", "torch runs frozen layers", "pip install 'lwfed[onnx]'"),
        (True, "print('1.23.2')", "ok", "ONNX Runtime 1.23.2 can run frozen layers", ""),
        (True, "raise ImportError('libgomp.so.1')", "fail", "ImportError: libgomp.so.1", "pip uninstall onnxruntime"),
        (True, "import os; os.kill(os.getpid(), 4)", "fail", "another processor", "pip uninstall onnxruntime"),
    ],
    ids=["missing", "works", "fails", "dies"],
)
def test_doctor_says_whether_onnx_runtime_can_be_used(monkeypatch, installed, code, status, text, advice):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(doctor, "ONNX_RUNTIME", code)
    check = doctor._onnx_runtime()
    assert (check.id, check.status) == ("torch.onnxruntime", status)
    assert text in check.text
    assert advice in check.advice


HERE = Access(BrokerAddress("here", 1883), Connection())


def speak_mqtt(access, error):
    broker = MemoryBroker()

    class Immediate(type(broker.transport())):
        def open(self, client_id, will, deliver):
            if error:
                deliver(Disconnected(error))
            else:
                super().open(client_id, will, deliver)
                broker.pump()

    return doctor._mqtt(access, Immediate(broker))


@pytest.mark.parametrize(("error", "status"), [(None, "ok"), (Refused("wrong password"), "fail"), (Unreachable("gone"), "fail")])
def test_doctor_speaks_mqtt(error, status):
    check = speak_mqtt(HERE, error)
    assert check.status == status
    assert error is None or str(error) in check.text


@pytest.mark.parametrize("device", ["porch", None])
def test_doctor_asks_whether_a_server_of_another_authority_is_the_one_of_the_enrolment(device):
    error = explain_failure(ssl.SSLCertVerificationError(), HERE.address, 1.0)
    text = speak_mqtt(replace(HERE, device=device), error).text
    assert ("is this the right server?" in text, "--ca" in text) == (device is not None, device is None)


def test_a_second_agent_with_the_same_state_is_refused(tmp_path):
    from lwfed.locks import locked_state

    with locked_state(tmp_path / "state", "end it"):
        result = run("join", "mqtt://localhost:1", "--data", "digits", "--state", str(tmp_path / "state"))
    assert result.exit_code == 73
    assert "--name" in result.stderr
    assert str(os.getpid()) in result.stderr


@pytest.mark.parametrize(("size", "mb"), [("600", 600), ("600MB", 600), ("1.5gb", 1500), (" 2 GB ", 2000)])
def test_a_size_is_in_megabytes_or_gigabytes(size, mb):
    assert megabytes(size) == mb


@pytest.mark.parametrize("size", ["", "0", "-5", "much", "600 MiB", "nan"])
def test_what_is_no_size_is_refused(size):
    result = CliRunner().invoke(main, ["join", "mqtt://localhost", "--data", "digits", "--memory-budget", size])
    assert result.exit_code == 2
    assert "write it like 600MB or 1.5GB" in result.stderr


def test_a_budget_below_the_agent_itself_is_refused_before_anything_starts(tmp_path):
    arguments = ["mqtt://localhost", "--data", "digits", "--state", str(tmp_path / "state"), "--memory-budget", "5MB"]
    result = CliRunner().invoke(main, ["join", *arguments])
    assert result.exit_code == 78
    assert re.search(
        r"--memory-budget 5MB: before any data the agent takes \d+ MB here, and its training process 80 MB at least", result.stderr
    )
