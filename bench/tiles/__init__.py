"""What bench/tiled_reduce.py measures and how it says so."""
