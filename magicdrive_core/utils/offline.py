"""Keeps libraries from sending telemetry or looking for updates, here and in every child process."""

from __future__ import annotations

import os

_VARIABLES = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # encoders are folders on disk, never downloads
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def disable_telemetry() -> None:
    """Sets the environment variables that are not set yet; call it before the libraries are imported."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
