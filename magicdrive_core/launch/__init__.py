"""Where process groups run: on this host, or on many through Slurm or Kubernetes.

launcher.py chooses by the settings; process_group.py supervises the ranks of one host, which elastic.py starts.
"""
