"""What the broker for enrolled devices takes of anybody who reaches its ports."""

import contextlib
import re
import shutil
import socket
import subprocess
import time

import pytest

from lwfed.cloud_server import watch
from lwfed.cloud_server.broker import ManagedBroker
from lwfed.cloud_server.gate import Gate, Place

from .gates import PATIENCE_S, free_ports, plugin_missing

pytestmark = pytest.mark.skipif(plugin_missing(), reason="mosquitto or its dynamic security plugin is not installed")
OLD_TLS = "openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nMinProtocol=TLSv1\nCipherString=DEFAULT@SECLEVEL=0\n"


@pytest.fixture
def ports(tmp_path, monkeypatch):
    """Of a broker on a machine whose OpenSSL would take any version of TLS."""
    (tmp_path / "openssl.cnf").write_text(OLD_TLS)
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
    gate = Gate(tmp_path, Place("localhost", free_ports()), "default")
    broker = ManagedBroker("mosquitto", 0, tmp_path / "broker", 122_880, gate)
    broker.start()
    yield gate.place.ports
    broker.close()
    gate.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls_before_1_2_is_refused_whatever_the_machine_allows(ports):
    for port in ports:
        agreed = {}
        for version in ("tls1_1", "tls1_2"):
            command = ["openssl", "s_client", "-connect", f"localhost:{port}", f"-{version}"]
            shown = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False).stdout
            agreed[version] = re.search(r"Cipher is (?!\(NONE\))", shown) is not None
        assert agreed == {"tls1_1": False, "tls1_2": True}


def test_strangers_fill_no_log(ports, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LOG_BYTES", 1000)
    log, by = tmp_path / "broker" / "broker.log", time.monotonic() + PATIENCE_S
    written = 0
    while written < 30:  # of others the broker says nothing, as it happens
        assert time.monotonic() < by
        before = log.stat().st_size
        with socket.create_connection(("localhost", ports[0])) as link, contextlib.suppress(ConnectionError):
            link.sendall(b"GET / HTTP/1.1\r\n\r\n")
            link.recv(100)
        written += log.stat().st_size > before
    while not ("OpenSSL Error" in log.read_text() and log.stat().st_size <= 1000):
        assert time.monotonic() < by
        time.sleep(0.01)
