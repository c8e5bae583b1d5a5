"""What accelerators can do: one YAML per product, every number with its source."""

from llmtrain.hardware.loader import Hardware, Link, Quantity, keys, load, match

__all__ = ["Hardware", "Link", "Quantity", "keys", "load", "match"]
