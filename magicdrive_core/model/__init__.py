"""The network, exactly."""
