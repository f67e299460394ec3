"""Prefect flows: when, where and how often. No numerics, no torch."""

from magicdrive_core.utils.offline import stay_silent

stay_silent()  # the one statement in a package's __init__: it must run before any flow imports prefect or mlflow
