"""Settings: the schema of params.yaml by section, loading with overrides, ready profiles."""
