"""Options of the engine deepspeed, and what DeepSpeed's own configuration may say beside them."""

from typing import Any, Literal

from pydantic import field_validator

from llmtrain.config.base import Section

OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "precision.compute",
    "fp16": "precision.compute and precision.loss_scale",
    "torch_autocast": "precision.compute",
    "communication_data_type": "precision.reduce",
    "data_types": "precision.accumulate",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer": "engine.offload_optimizer",
    "zero_optimization.offload_param": "engine.offload_params",
    "zero_optimization.compute_grad_norm": "nothing: the engine takes the norm itself",
    "zero_optimization.memory_efficient_linear": "nothing: it would replace torch.nn.functional.linear in the whole process",
    "tensor_parallel": "parallel.tp, which engine native has",
    "sequence_parallel_size": "parallel.cp, which engine native has",
    "checkpoint": "checkpoint",
    "compression_training": "nothing: it changes the model",
}
"""Entries of DeepSpeed's configuration that the engine writes itself -> the option of a run that stands for them."""


class DeepSpeedEngineConfig(Section):
    """DeepSpeed's ZeRO over data-parallel ranks (docs/engines.md)."""

    kind: Literal["deepspeed"] = "deepspeed"
    """The engine."""
    zero: Literal[0, 1, 2, 3] = 2
    """What the data-parallel ranks share: 0 nothing; 1 the optimizer's state and fp32 weights; 2 gradients too; 3 parameters too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where moments and fp32 weights are kept: on the device; in the host's memory, where the processor updates them (needs zero 1 to 3);
    or in files, from which they come there group by group (needs zero 3)."""
    offload_params: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters wait until a layer is computed; needs zero 3."""
    nvme_path: str | None = None
    """The folder for what is offloaded to nvme, on a disk of each machine. Every process makes one in it and removes it when it ends."""
    options: dict[str, Any] = {}
    """More of DeepSpeed's own configuration, as its JSON has it: `{zero_optimization: {overlap_comm: true}}`."""

    @property
    def swaps(self) -> bool:
        """Whether anything is offloaded to files."""
        return "nvme" in (self.offload_optimizer, self.offload_params)

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        for path, option in OURS.items():
            inside: Any = options
            for key in path.split("."):
                inside = inside.get(key) if isinstance(inside, dict) else None
            if inside is not None:
                raise ValueError(f"{path} is written by the engine itself; in its place stands {option}")
        return options
