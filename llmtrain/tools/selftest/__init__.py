"""`llmtrain selftest`: what a machine computes, how wrong and how fast, in one file to send back."""
