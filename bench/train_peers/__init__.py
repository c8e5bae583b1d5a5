"""The contenders of bench/train.py, each built in a process of its own."""
