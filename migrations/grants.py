"""What a service's role may do in a database that it does not own: read and write rows, and nothing to tables.

The owner migrates and gives. It gives before the revisions run, for tables to come as well, so that a service which
sees a new revision may use what came with it. The version table can be read only: a service must not be able to let
itself in. Nobody else can connect. Giving again changes nothing.
"""

from __future__ import annotations

from psycopg import sql
from sqlalchemy import Connection

from servicekit.schema import VERSION_TABLE

_ROWS = sql.SQL("SELECT, INSERT, UPDATE, DELETE")


class OwnRoleError(Exception):
    """The role to give to is the one that gives: it would lose the version table."""


def give(connection: Connection, role: str) -> None:
    """Gives the role all that it needs, in one transaction."""
    with connection.begin():
        owner, database, schema, versioned = connection.exec_driver_sql(
            "SELECT current_user, current_database(), current_schema(), to_regclass(%s) IS NOT NULL", (VERSION_TABLE,)
        ).one()
        if owner == role:
            raise OwnRoleError(role)
        names = {
            "database": sql.Identifier(database),
            "schema": sql.Identifier(schema),
            "role": sql.Identifier(role),
            "rows": _ROWS,
        }
        for statement in (
            "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
            "GRANT CONNECT ON DATABASE {database} TO {role}",
            "GRANT USAGE ON SCHEMA {schema} TO {role}",
            "GRANT {rows} ON ALL TABLES IN SCHEMA {schema} TO {role}",
            "GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role}",
            "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT {rows} ON TABLES TO {role}",
            "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE, SELECT ON SEQUENCES TO {role}",
        ):
            connection.exec_driver_sql(sql.SQL(statement).format(**names).as_string())
        if versioned:
            _lock_versions(connection, role)


def lock_versions(connection: Connection, role: str) -> None:
    """Leaves the role nothing but reading of the version table, once that is there."""
    with connection.begin():
        _lock_versions(connection, role)


def _lock_versions(connection: Connection, role: str) -> None:
    names = {"table": sql.Identifier(VERSION_TABLE), "role": sql.Identifier(role)}
    connection.exec_driver_sql(
        sql.SQL("REVOKE INSERT, UPDATE, DELETE ON {table} FROM {role}").format(**names).as_string()
    )
