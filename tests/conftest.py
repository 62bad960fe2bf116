"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts its background jobs so, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that is not committed: `TRD_SHARED_DATA`, else `shared/data` beside the checkout."""
    path = Path(os.environ.get("TRD_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path}; set TRD_SHARED_DATA to a folder with gsm8k/, math/, models/ …")
    return path


@pytest.fixture(scope="session")
def quickstart_models() -> Path:
    """The teacher and student that ship with the repository."""
    return REPOSITORY / "recipes" / "quickstart" / "models"
