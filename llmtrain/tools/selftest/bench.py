"""What a self-test times, by kind of device. Small enough for a minute or two, large enough to tell a broken machine from a good one."""

from llmtrain.tools.selftest.work import Job

CPU, ACCELERATOR = "cpu", "accelerator"
MATMUL = {CPU: {"fp32": [512, 1024]}, ACCELERATOR: {"fp32": [2048, 4096], "bf16": [2048, 4096, 8192], "fp16": [8192]}}
"""Sizes of square matrix products by format."""
MEMORY = {CPU: 64, ACCELERATOR: 1024}
MESSAGES = {CPU: [1, 16], ACCELERATOR: [1, 16, 256]}
"""Copied, and summed over all ranks, in MiB."""
MODEL = {
    CPU: {"vocab_size": 2048, "layers": 4, "hidden": 192, "attention": {"heads": 4, "kv_heads": 2}, "ffn": {"hidden": 512}},
    ACCELERATOR: {"vocab_size": 32000, "layers": 12, "hidden": 2048, "attention": {"heads": 16, "kv_heads": 8}, "ffn": {"hidden": 5632}},
}
TRAIN = {
    CPU: {"seq_len": 256, "micro_batch": 2, "precision": "fp32", "steps": 5},
    ACCELERATOR: {"seq_len": 2048, "micro_batch": 4, "precision": "16 bits", "steps": 12},
}
"""The model that is trained for speed: 2 M parameters on a CPU, 0.7 billion on an accelerator, in the 16 bits it has."""


def alone(device: str, formats: list[str]) -> list[Job]:
    """What one rank measures."""
    kind = CPU if device == CPU else ACCELERATOR
    jobs = [
        Job(f"matmul {size} {name}", "matmul", {"size": size, "format": name})
        for name, sizes in MATMUL[kind].items()
        if name in formats
        for size in sizes
    ]
    return [*jobs, Job("memory", "memory", {"mebibytes": MEMORY[kind]}), _train(kind, 1)]


def together(device: str, ranks: int) -> list[Job]:
    """What all ranks measure."""
    if ranks == 1:
        return []
    kind = CPU if device == CPU else ACCELERATOR
    jobs = [Job(f"all-reduce {size} MiB", "collectives", {"mebibytes": size}) for size in MESSAGES[kind]]
    return [*jobs, _train(kind, ranks)]


def _train(kind: str, ranks: int) -> Job:
    return Job(f"train, {ranks} rank{'s' if ranks > 1 else ''}", "train", {"model": MODEL[kind], "ranks": ranks, **TRAIN[kind]})
