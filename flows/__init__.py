"""Prefect flows: when, where and how often the commands run. No numerics, no torch."""

from magicdrive_core.utils.offline import disable_telemetry

disable_telemetry()  # must run before any flow imports prefect or mlflow
