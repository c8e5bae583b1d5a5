"""Training scripts written by hand, each for one mesh alone: what `bench/parallel.py` holds the engine to.

Plain PyTorch and its process groups. Of llmtrain they take single-device kernels (attention, RMSNorm, RoPE, the loss of one rank) and the
mask that attention asks for, so that kernels do not blur the comparison; every collective, and who holds what, is written out here.
"""
