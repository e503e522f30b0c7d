"""Tables are made where there are none, and migrated where they are older."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, inspect, select

from lwfed.cloud_server.store import exclusion, schema
from lwfed.cloud_server.store.database import Database
from lwfed.errors import StateError


def prepare(database: Database) -> None:
    """Bring the tables to `schema.HEAD`; of an older SQLite file a copy is kept beside it. Raises StateError."""
    version = check(database)
    if version == schema.HEAD:
        return
    if version is not None and database.path is not None:
        _copy(database.path, version)
    database.transact(lambda connection: _bring_up_to_date(connection, database.name))


def check(database: Database) -> str | None:
    """The version of the tables; None where there are none. Raises StateError for one that this program cannot migrate."""
    version = database.transact(lambda connection: _version(connection, database.name))
    if version is None or int(schema.FIRST) <= int(version) <= int(schema.HEAD):
        return version
    if int(version) > int(schema.HEAD):
        remedy = "install the lwfed that wrote it, or a later one, or use another --state or --database"
        raise StateError(f"{database.name} is of version {version}, newer than this cloud-server's {schema.HEAD}: {remedy}")
    remedy = "finish the run with the lwfed that began it, or use another --state"
    raise StateError(f"{database.name} is of version {version}; this cloud-server takes over {schema.FIRST} and later: {remedy}")


def _version(connection: Connection, name: str) -> str | None:
    tables = set(inspect(connection).get_table_names())
    if schema.version.name in tables:
        return str(connection.execute(select(schema.version.c.version_num)).scalar_one())
    if connection.dialect.name == "sqlite" and (number := connection.exec_driver_sql("PRAGMA user_version").scalar_one()):
        return str(number)
    if taken := sorted(tables & set(schema.metadata.tables)):
        raise StateError(f"{name} has tables of another program ({', '.join(taken)}): give lwfed a database, or a schema, of its own")
    return None


def _bring_up_to_date(connection: Connection, name: str) -> None:
    exclusion.wait_to_change(connection)
    version = _version(connection, name)  # another server may have been quicker
    if version is None:
        schema.metadata.create_all(connection)
        schema.version.create(connection)
        connection.execute(schema.version.insert().values(version_num=schema.HEAD))
    elif version != schema.HEAD:
        _send_servers_away(connection, name)
        _migrate(connection, version)
    if connection.dialect.name == "sqlite":  # a program of before migrations looks at this, and refuses
        connection.exec_driver_sql(f"PRAGMA user_version = {schema.HEAD}")


def _send_servers_away(connection: Connection, name: str) -> None:
    if connection.dialect.name != "postgresql":
        return
    served = [run for run in connection.scalars(select(schema.runs.c.name)) if not exclusion.block(connection, run)]
    if served:
        raise StateError(f"{name} is to be migrated, and older cloud-servers serve {', '.join(served)} in it: end them first")


def _migrate(connection: Connection, version: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "lwfed.cloud_server.store:migrations")
    config.attributes["connection"] = connection
    if version == schema.FIRST:
        command.stamp(config, schema.FIRST)
    command.upgrade(config, schema.HEAD)


def _copy(path: Path, version: str) -> None:
    """As ``run-6.sqlite``, whole or not at all."""
    temporary = path.with_name(f"{path.name}.copy")
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(temporary)) as copy:
        source.backup(copy)
    temporary.replace(path.with_name(f"{path.stem}-{version}{path.suffix}"))
