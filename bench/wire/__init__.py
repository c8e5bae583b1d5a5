"""Ranks in network namespaces of this machine, on one wire whose speed can be set; for benches and examples."""
