"""Libraries that would call home or look for updates are told not to, here and in every child process."""

from __future__ import annotations

import os

SILENT = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # encoders are folders on disk, never downloads
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


def stay_silent() -> None:
    """Sets the variables that are not set already; call before the libraries are imported."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
