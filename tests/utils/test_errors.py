"""Errors never show what logs in."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicdrive_core.errors import MagicDriveError, redact

WORD = st.text(string.ascii_letters + string.digits + ":/@%$.-", min_size=8, max_size=20)


@given(user=st.text(string.ascii_letters, max_size=8), password=WORD, before=st.sampled_from(["", "no answer of '"]))
def test_no_password_of_an_address_is_shown(user: str, password: str, before: str) -> None:
    error = MagicDriveError(f"{before}postgresql+psycopg://{user}:{password}@db.example:5432/mlflow", "set another")
    assert str(error).endswith("postgresql+psycopg://***@db.example:5432/mlflow (set another)")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://token@host/x", "https://***@host/x"),
        ("mysql://host/db?ssl=1&sslpassword=x&a=b", "mysql://host/db?ssl=1&sslpassword=***&a=b"),
        ("http://h/?API_KEY=x", "http://h/?API_KEY=***"),
        ("tcp://10.0.0.1:8786", "tcp://10.0.0.1:8786"),
        ("sqlite:////home/me@work/tracking/mlflow.db", "sqlite:////home/me@work/tracking/mlflow.db"),
        ("models:/magicdrive-demo@stage3", "models:/magicdrive-demo@stage3"),
        ("clip 3 of scene-0061 at 12:30, write to a@b.c", "clip 3 of scene-0061 at 12:30, write to a@b.c"),
    ],
)
def test_other_parts_of_a_text_stay(text: str, shown: str) -> None:
    assert redact(text) == shown
