"""The database fixtures of the tracking tests."""

from tests.tracking.conftest import migrated, project

__all__ = ["migrated", "project"]
