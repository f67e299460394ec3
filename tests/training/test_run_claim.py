"""One training at a time in a run's folder, on file systems that know no locks."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from magicdrive_core.errors import MagicDriveError


def test_a_second_training_in_a_folder_is_refused_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicdrive_core.training.worker import claimed

    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")  # what Lustre answers unless it is mounted with flock

    monkeypatch.setattr(fcntl, "flock", refused)
    refusal = pytest.raises(MagicDriveError, match="is being trained by another process")
    with claimed(tmp_path), refusal, claimed(tmp_path):
        pass
    with claimed(tmp_path):  # the first one has ended
        pass
