"""Run by Alembic, within the transaction of the connection that it is given."""

from __future__ import annotations

from alembic import context

from lwfed.cloud_server.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=schema.version.name,
)
with context.begin_transaction():
    context.run_migrations()
