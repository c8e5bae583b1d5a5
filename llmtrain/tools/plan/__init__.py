"""`llmtrain plan`: time, memory and the best mesh of a run, before it runs."""
