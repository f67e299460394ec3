"""The W-CODA 2024 benchmark: package, validation, report."""
