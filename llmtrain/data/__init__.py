"""Data: tokenizers, memory-mapped token files, packing, blending. No torch.distributed call anywhere on this floor."""
