"""Addresses of services lose their credentials where settings are read."""

from __future__ import annotations

import os

import pytest

from components.pipeline.credentials import withdraw_credentials, without_credentials
from components.pipeline.errors import UsageError
from components.pipeline.settings import load_settings

PLACES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_URL",
    "PREFECT_API_AUTH_STRING",
    "RAY_ADDRESS",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PLACES:
        # Set first, so that what the code under test sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in PLACES if name in os.environ}


def test_user_and_password_go_where_the_clients_look_for_them(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", "http://me:p%2Fw%40%3A@host:5000/x")
    environment.setenv("MLFLOW_TRACKING_PASSWORD", "an older one")
    environment.setenv("PREFECT_API_URL", "https://me:p@ss%2F@[::1]:4200/api")
    settings = load_settings()
    assert (settings.tracking, settings.prefect_api) == (
        "http://host:5000/x",
        "https://[::1]:4200/api",
    )
    after = {
        "MLFLOW_TRACKING_URI": "http://host:5000/x",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "p/w@:",
        "PREFECT_API_URL": "https://[::1]:4200/api",
        "PREFECT_API_AUTH_STRING": "me:p@ss/",
    }
    assert found() == after
    # The second reader, in this process or in a child, finds the same.
    assert load_settings() == settings
    assert found() == after


@pytest.mark.parametrize(
    "address",
    [
        "http://host:5000",
        "sqlite:////home/me@work/mlflow.db",
        "/home/me@work/runs",
        "postgresql://me:word@host/mlflow",
    ],
)
def test_an_address_without_a_login_of_its_own_stays_as_it_is(
    address: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("MLFLOW_TRACKING_URI", address)
    assert load_settings().tracking == address
    assert found() == {"MLFLOW_TRACKING_URI": address}


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("MLFLOW_TRACKING_URI", "http://me:secret/word@host"),
        ("MLFLOW_TRACKING_URI", "http://me:secret?word@host"),
        ("MLFLOW_TRACKING_URI", "http://me:secret#word@host"),
        ("MLFLOW_TRACKING_URI", "http://[me:secret@host"),
        ("MLFLOW_TRACKING_URI", "me:secret@host:5000"),
        ("PREFECT_API_URL", "me:secret@host:4200/api"),
        ("RAY_ADDRESS", "ray://me:secret@host:10001"),
    ],
)
def test_a_password_that_cannot_be_taken_out_is_refused_and_not_shown(
    name: str, address: str, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(name, address)
    with pytest.raises(UsageError) as caught:
        withdraw_credentials()
    assert caught.value.where == name
    assert caught.value.remedy
    assert "secret" not in str(caught.value)


def test_an_address_is_shown_without_its_login() -> None:
    assert without_credentials("postgresql://me:word@host:1/db") == "postgresql://host:1/db"
    assert without_credentials("s3://bucket/a@b") == "s3://bucket/a@b"
