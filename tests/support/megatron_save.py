"""A small model in megatron-core's own distributed format: `python megatron_save.py FOLDER` in a process of its own."""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

import megatron_cpu  # noqa: F401
import torch
import torch.distributed as dist
from torch.nn import functional as F


def main(folder: Path) -> None:
    """Write iter_0000007, and the same weights by torch alone as written.pt."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3)
    sizes = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
    plain = {"normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
    plain |= {"use_cpu_initialization": True, "bias_activation_fusion": False, "persist_layer_norm": False}
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(TransformerConfig(**sizes | plain), spec, 64, 32, position_embedding_type="rope")
    iteration = folder / "iter_0000007"
    iteration.mkdir()
    dist_checkpointing.save({"args": argparse.Namespace(**sizes), "iteration": 7} | model.sharded_state_dict(), str(iteration))
    torch.save({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}, folder / "written.pt")


if __name__ == "__main__":  # its writers are processes that import this file again
    main(Path(sys.argv[1]))
    for child in multiprocessing.active_children():  # that of its queue would keep the standard output open
        child.terminate()
    sys.stdout.flush()
    os._exit(0)
