"""Fused operators of torch_npu behind the registry, each with the checks that the operator lacks. Not run on hardware.

docs/npu-checks.md says what was checked without it. Importing this package registers them; torch_npu is looked for only when a run asks
for device npu.
"""

from llmtrain.ops.npu import attention, attention_parts, cross_entropy, experts, norm, pointwise

__all__ = ["attention", "attention_parts", "cross_entropy", "experts", "norm", "pointwise"]
