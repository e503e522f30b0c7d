"""A PostgreSQL of the tests' own: a child process on a socket in a folder of its own, with nothing but what is asked for."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

DEBIAN = Path("/usr/lib/postgresql")
LONG_S = 60
FAST = ["fsync=off", "full_page_writes=off", "max_connections=20", "shared_buffers=16MB", "listen_addresses="]


def find(program):
    """PostgreSQL's program of that name; Debian keeps them off the path."""
    versions = sorted(DEBIAN.glob(f"*/bin/{program}"), key=lambda path: float(path.parts[-3]))
    return shutil.which(program) or next((str(path) for path in reversed(versions)), None)


class Postgres:
    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="lwfed-pg-")  # a short path: that of a socket has at most 107 bytes
        self._user = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._data = f"{self.folder}/data"
        options = ["-U", "lwfed", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "-D", self._data]
        subprocess.run([find("initdb"), *options], check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self._user)
        self._schemas = 0
        self.start()

    def start(self):
        settings = [word for setting in FAST for word in ("-c", setting)]
        command = [find("postgres"), "-D", self._data, "-k", self.folder, *settings]
        log = subprocess.DEVNULL
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, stdin=log, **self._user)
        until = time.monotonic() + LONG_S
        while True:
            try:
                return self.connect().close()
            except psycopg.OperationalError:
                assert self.process.poll() is None, "PostgreSQL ended"
                assert time.monotonic() < until, "PostgreSQL does not answer"
                time.sleep(0.02)

    def stop(self, how=signal.SIGINT):
        self.process.send_signal(how)
        self.process.wait(LONG_S)

    def close(self):
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def connect(self):
        return psycopg.connect(host=self.folder, user="lwfed", dbname="postgres", autocommit=True)

    def address(self):
        """Of tables that nobody else uses."""
        self._schemas += 1
        name = f"test_{self._schemas}"
        with self.connect() as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"postgresql://lwfed:secret@/postgres?host={self.folder}&options=-csearch_path%3D{name}"

    def cut(self):
        """End all connections but the one that does it."""
        with self.connect() as connection:
            others = "pid != pg_backend_pid() AND datname IS NOT NULL"
            connection.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")
