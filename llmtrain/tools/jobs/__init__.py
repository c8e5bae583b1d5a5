"""Job files for clusters: `llmtrain launch torchrun|slurm|kubernetes`. Local ranks are started by `llmtrain.tools.launch`."""
