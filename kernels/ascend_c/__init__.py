"""FastAttention in Ascend C: a source, and a shim that runs it on the CPU. Nothing here launches it on an NPU (README.md)."""
