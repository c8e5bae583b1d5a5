"""Arguments of Megatron-LM and MindSpeed-LLM that need no option here, with the reason. Needs no torch."""

import fnmatch

_PATTERNS = {
    "kernels per op are chosen (`kernels`)": (
        *("use_flash_attn", "attention_backend", "use_fused_*", "*_fusion", "no_*_fusion", "no_persist_layer_norm", "moe_grouped_gemm"),
        *("cross_entropy_*", "transformer_impl", "use_mcore_models", "use_legacy_models", "spec", "moe_router_fusion", "te_rng_tracker"),
        *(
            "mla_fa_without_pad",
            "mtp_mem_efficient_logits",
            "moe_permutation_async_comm",
            "use_ascend_*",
            "coc_*",
            "attention_softmax_in_fp32",
        ),
        *("fused_residual_rmsnorm", "moe_use_legacy_grouped_gemm", "use_mc2", "apply_query_key_layer_scaling", "no_shared_storage"),
    ),
    "parallel.tp always cuts the sequence too": ("sequence_parallel",),
    "collectives overlap where they can": (
        *("overlap_*", "*_overlap", "tp_comm_*", "delay_*", "align_*", "num_distributed_optimizer_instances", "ddp_*"),
        *("moe_token_dispatcher_type", "moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_shared_expert_overlap", "moe_alltoall_*"),
    ),
    "the router computes in fp32 or higher": ("moe_router_dtype", "router_gating_in_fp32"),
    "a loss is a mean over the step's target tokens": ("calculate_per_token_loss",),
    "gradients are reduced in fp32 unless precision.reduce says otherwise": ("accumulate_allreduce_grads_in_fp32",),
    "implied by another option": ("no_position_embedding", "use_rotary_position_embeddings", "use_checkpoint_args", "model_type"),
    "a run goes on from its own newest checkpoint, moments and all": ("no_load_*", "no_save_rng", "finetune", "exit_on_missing_checkpoint"),
    "checkpoints have one format": ("ckpt_format", "use_dist_ckpt", "dist_ckpt_*", "ckpt_*", "auto_detect_ckpt_format"),
    "reading, memory and logs look after themselves": (
        *("num_workers", "no_mmap_bin_files", "no_create_attention_mask_in_dataloader", "dataloader_type", "tiktoken_pattern"),
        *("manual_gc*", "empty_unused_memory_level", "log_*", "no_log_*", "timing_log_*", "check_for_nan_*", "no_check_for_nan_*"),
        *("tensorboard_*", "wandb_*", "exit_signal_handler", "use_pytorch_profiler", "profile_ranks", "moe_per_layer_logging"),
        *("swap_optimizer_times", "recompute_method", "recompute_num_layers", "recompute_granularity", "local_rank"),
    ),
    "torch's own launcher starts the ranks, and the device says which collectives": (
        *("distributed_backend", "use_cpu_initialization", "nnodes", "nproc_per_node", "lazy_mpu_init", "data_parallel_random_init"),
    ),
    "weights are drawn from the seed, whatever the mesh": ("no_initialization", "perform_initialization"),
    "moves no weight to a place of its own": (
        "use_tp_pp_dp_mapping",
        "tp_2d",
        "enable_gloo_process_groups",
        "no_enable_gloo_process_groups",
    ),
}


def needs_nothing(name: str) -> str | None:
    """Why the argument of this name needs no option here; None for one that has no counterpart."""
    return next((why for why, patterns in _PATTERNS.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)), None)
