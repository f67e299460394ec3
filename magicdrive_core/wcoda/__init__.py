"""The W-CODA 2024 submission: names, package, validator, long videos."""
