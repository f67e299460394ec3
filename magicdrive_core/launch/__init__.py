"""Where process groups run: on this host, or on many through Slurm or Kubernetes."""
