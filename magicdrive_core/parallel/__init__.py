"""What is applied to a model from outside: device mesh, sequence parallelism, slicing."""
