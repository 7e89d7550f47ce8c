"""What every table of the router's database is read and written with."""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """BEGIN IMMEDIATE to COMMIT; rolled back by any exception. The connection must not be inside another one."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()
        raise


def rows(db: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """As dictionaries, whatever `row_factory` the connection has."""
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def row(db: sqlite3.Connection, query: str, values: tuple[Any, ...] = ()) -> dict[str, Any] | None:
    return next(iter(rows(db, query, values)), None)


def digest(data: bytes) -> bytes:
    """What is kept of a secret of 32 random bytes: such a one needs no salt and no slow hash."""
    return hashlib.sha256(data).digest()
