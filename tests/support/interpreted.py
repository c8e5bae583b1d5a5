"""Imported by tests of kernels in Triton before they import these: Triton's interpreter serves here, or the module is skipped."""

import os

import pytest

# Triton reads it when it is imported.
if os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton: make test-kernels")

from llmtrain_kernels.triton_attention.available import unavailable

if reason := unavailable("cpu"):
    pytest.skip(reason, allow_module_level=True)
