"""Numbers that the command line's help shows; needs no torch."""

LIMIT = 1 << 15
"""Values kept of one tensor unless told otherwise: 128 KiB in fp32."""
