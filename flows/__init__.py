"""Prefect flows: when, where and how often. No numerics, no torch."""
