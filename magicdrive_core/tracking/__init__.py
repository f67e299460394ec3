"""Runs, models and lineage in MLflow."""
