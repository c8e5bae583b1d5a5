"""Typed, validated configuration of a run."""
