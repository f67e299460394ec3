"""Tracking with MLflow: runs, registered models, and the lineage of results."""
