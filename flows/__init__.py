"""Prefect flows: when, where and how often the commands run. No numerics, no torch."""

from magicdrive_core.utils.offline import stay_silent

stay_silent()  # must run before any flow imports prefect or mlflow
