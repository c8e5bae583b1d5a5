"""Worlds of several processes that `bench/parallel.py` compares: the engine's, and those of the scripts in `by_hand`."""
