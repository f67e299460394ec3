"""What happened, in MLflow."""
