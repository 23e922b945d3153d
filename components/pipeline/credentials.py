"""Credentials in addresses of services: they go where the client of the service looks for them.

Addresses are shown on pages, written into manifests and printed by libraries; variables that hold
nothing but a password are not.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote as unquoted
from urllib.parse import urlsplit, urlunsplit

from components.pipeline.errors import UsageError


def withdraw_credentials() -> None:
    """Take user and password out of the addresses in the environment, for children too.

    The address of a database keeps its own: its driver knows no other place.

    Raises:
        UsageError: an address holds credentials in a place where they cannot be told from the rest,
            or is of a service that knows none.
    """
    if login := _withdrawn("MLFLOW_TRACKING_URI"):
        for part, value in zip(("USERNAME", "PASSWORD"), login, strict=True):
            if value:
                os.environ[f"MLFLOW_TRACKING_{part}"] = value
    if login := _withdrawn("PREFECT_API_URL"):
        os.environ["PREFECT_API_AUTH_STRING"] = ":".join(login)
    if "@" in os.environ.get("RAY_ADDRESS", ""):
        raise UsageError(
            "the address of a cluster may not hold credentials",
            where="RAY_ADDRESS",
            remedy="leave them out: Ray takes a token, by RAY_AUTH_TOKEN_PATH",
        )


def without_credentials(uri: str) -> str:
    """The address without user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _withdrawn(variable: str) -> tuple[str, str] | None:
    """User and password of the address in a variable, which is left with the rest."""
    address = os.environ.get(variable, "")
    if "@" not in address:
        return None
    try:
        parts = urlsplit(address)
    except ValueError:
        raise _unreadable(variable) from None
    if parts.scheme not in ("http", "https"):
        # Without its scheme the address would be taken for a path, and shown.
        if re.match(r"[^/]*:[^/]*@", address):
            raise _unreadable(variable)
        return None
    login, _, host = parts.netloc.rpartition("@")
    rest = urlunsplit(parts._replace(netloc=host))
    if "@" in rest:
        raise _unreadable(variable)
    os.environ[variable] = rest
    user, _, password = login.partition(":")
    return unquoted(user), unquoted(password)


def _unreadable(variable: str) -> UsageError:
    return UsageError(
        "the address has an @ where none can be; it is not shown, for it may hold a password",
        where=variable,
        remedy="write http://user:password@host:port, with /, ?, # and @ of the password quoted "
        "(%2F, %3F, %23, %40)",
    )
