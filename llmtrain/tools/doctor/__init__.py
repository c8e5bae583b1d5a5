"""`llmtrain doctor`: what this machine has, which of it does not fit together, and what to do.

Nothing here imports torch: where torch_npu is installed without CANN, `import torch` itself fails. What needs torch runs in child
processes (`torch_child.py`, `smoke_rank.py`). Parsers take text, checks take a `Machine`, so recorded outputs of real tools test both.
"""
