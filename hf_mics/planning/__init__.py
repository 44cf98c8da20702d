"""Choosing a partition size before a job runs: memory, traffic and time of a workload on a cluster, without GPUs."""
