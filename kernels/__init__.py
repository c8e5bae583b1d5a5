"""FastAttention and friends: kernels usable without the rest of llmtrain."""
