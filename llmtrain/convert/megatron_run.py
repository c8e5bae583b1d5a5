"""Arguments of Megatron-LM and MindSpeed-LLM -> every section of a run but the model's. Needs no torch."""

import math
from pathlib import PurePath
from typing import Any

from llmtrain.convert.megatron_arguments import Given, flag
from llmtrain.convert.megatron_model import Say

SENTENCEPIECE = ("SentencePieceTokenizer", "Llama2Tokenizer", "GPTSentencePieceTokenizer")
HUGGING_FACE = ("HuggingFaceTokenizer", "PretrainedFromHF")


def run_values(given: Given, say: Say) -> dict[str, Any]:
    """The sections, as plain values; `say` is told what cannot be had here."""
    parallel = _parallel(given, say)
    sections = _names(given, say) | {
        "tokenizer": _tokenizer(given, say),
        "data": _data(given, say),
        "optim": _optim(given, say),
        "train": _train(given, say, _data_ranks(given)),
        "parallel": parallel,
        "precision": _precision(given, say),
        "checkpoint": _checkpoint(given, say),
        "metrics": _metrics(given),
    }
    sections["schedule"] = _schedule(given, sections["train"], say)
    return {key: value for key, value in sections.items() if value not in (None, {})}


def _names(given: Given, say: Say) -> dict[str, Any]:
    save, load = given.get("save"), given.get("load")
    if load is not None and load != save:
        say(f"--load {load}: `llmtrain convert {load} RUN --to native`, then model.pretrained: RUN")
    path = PurePath(str(save)) if save is not None else None
    names = {} if path is None else {"name": path.name, "output": str(path.parent)}
    return names | {"seed": given.integer("seed", default=1234)}


def _tokenizer(given: Given, say: Say) -> dict[str, Any]:
    kind, path = given.get("tokenizer_type"), given.get("tokenizer_model", "tokenizer_name_or_path")
    if path is None:
        if kind not in (None, "NullTokenizer"):
            say(f"--tokenizer-type {kind}: name a tokenizer.json or a sentencepiece model (tokenizer.path)")
        return {}
    kinds = dict.fromkeys(SENTENCEPIECE, "sentencepiece") | dict.fromkeys(HUGGING_FACE, "hf")
    if kind not in kinds:
        say(f"--tokenizer-type {kind}: there are sentencepiece and Hugging Face's (tokenizer.kind)")
    return {"path": str(path)} | ({"kind": kinds[kind]} if kind in kinds else {})


def _data(given: Given, say: Say) -> dict[str, Any]:
    train = given.list("data_path") or given.list("train_data_path")
    if given.on("mock_data") or not train:
        say("no --data-path: name data.train")
    validation = given.list("valid_data_path")
    split = given.get("split")
    if split is not None and not validation and any(float(part) for part in str(split).split(",")[1:]):
        say(f"--split {split}: validation is a source of its own; `llmtrain data tokenize --validation SHARE` cuts one off")
    values: dict[str, Any] = {"train": _blend(train), "validation": _blend(validation)}
    values["document_mask"] = given.on("reset_attention_mask")
    if given.on("reset_position_ids", "eod_mask_loss") and not values["document_mask"]:
        say("--reset-position-ids or --eod-mask-loss without --reset-attention-mask: data.document_mask does all three or none")
    values["cache"] = given.get("data_cache_path")
    return {key: value for key, value in values.items() if value not in (None, [])}


def _blend(words: list[Any]) -> list[dict[str, Any]]:
    """Paths, or weights and paths in turn; MindSpeed-LLM also takes them with commas."""
    items = [part for word in words for part in (str(word).split(",") if isinstance(word, str) else [word]) if part != ""]
    if items and not isinstance(items[0], str):
        return [{"path": str(path), "weight": float(weight)} for weight, path in zip(items[::2], items[1::2])]
    return [{"path": item} for item in items]


def _optim(given: Given, say: Say) -> dict[str, Any]:
    kind = given.get("optimizer", default="adam")
    if kind != "adam":
        say(f"--optimizer {kind}: there is adamw")
    if given.get("decoupled_lr") is not None:
        say("--decoupled-lr: embedding and head have the learning rate of all parameters")
    given.get("decoupled_min_lr")
    clip = given.number("clip_grad", default=1.0)
    values = {
        "lr": given.number("lr"),
        "betas": [given.number("adam_beta1", default=0.9), given.number("adam_beta2", default=0.999)],
        "eps": given.number("adam_eps", default=1e-8),
        "weight_decay": given.number("weight_decay", default=0.01),
        # Megatron decays no vector: neither biases nor norms.
        "no_decay": ["*.bias", "*_bias", "*norm.weight"],
    }
    values |= {"offload": True} if given.on("swap_optimizer", "optimizer_cpu_offload") else {}
    found = {key: value for key, value in values.items() if value is not None}
    return found | {"max_grad_norm": clip if clip else None}


def _train(given: Given, say: Say, data_ranks: int | None) -> dict[str, Any]:
    micro = given.integer("micro_batch_size", default=1)
    batch = given.integer("global_batch_size", default=micro * data_ranks if data_ranks else None)
    seq_len, values = given.integer("seq_length", default=1024), {"micro_batch": micro}
    if batch is None:
        say("no --global-batch-size: set train.global_batch to micro-batch x data-parallel ranks")
    values |= {"seq_len": seq_len} | ({"global_batch": batch} if batch else {}) | _length(given, batch, seq_len)
    values |= _recompute(given, say)
    if given.on("deterministic_mode"):
        values["deterministic"] = True
    interval, iterations = given.integer("eval_interval", default=1000), given.integer("eval_iters", default=100)
    return values | ({"validate_every": interval, "validate_samples": iterations * (batch or micro)} if iterations else {})


def _length(given: Given, batch: int | None, seq_len: int) -> dict[str, Any]:
    samples, ramp = given.integer("train_samples"), given.list("rampup_batch_size")
    if ramp and samples and batch:
        return {"phases": [{"tokens": samples * seq_len, "batch": _ramp([int(word) for word in ramp], batch, seq_len)}]}
    if samples and batch:
        return {"steps": -(-samples // batch)}
    steps = given.integer("train_iters")
    return {} if steps is None else {"steps": steps}


def _ramp(words: list[int], batch: int, seq_len: int) -> list[dict[str, int]]:
    """`--rampup-batch-size START INCREMENT SAMPLES`: batches between START and the whole one, each for an equal part of SAMPLES."""
    start, increment, samples = words
    sizes = list(range(start, batch + 1, increment))
    each = samples / max(1, len(sizes) - 1)
    return [{"from_tokens": int(index * each) * seq_len, "size": size} for index, size in enumerate(sizes)]


_MODULES = {"mla_up_proj": "mla_up", "layernorm": "norms", "moe_act": "activation"}


def _recompute(given: Given, say: Say) -> dict[str, Any]:
    granularity = "selective" if given.on("recompute_activations") else given.get("recompute_granularity")
    modules, number = given.list("recompute_modules"), given.integer("recompute_num_layers")
    if given.get("recompute_method") == "block" or (number or 1) > 1:
        say("--recompute-num-layers: train.recompute full computes every block again, one at a time")
    if granularity == "full":
        return {"recompute": "full"}
    for module in modules:
        if module not in (*_MODULES, "core_attn"):
            say(f"--recompute-modules {module}: train.recompute knows {', '.join(_MODULES.values())}, permute")
    named = [_MODULES[module] for module in modules if module in _MODULES]
    named += ["activation"] * (given.on("recompute_activation_function") and "activation" not in named)
    return {"recompute": named} if named else {}


def _data_ranks(given: Given) -> int | None:
    """Ranks that read different samples, where the launcher's words are there."""
    nodes, local = given.integer("nnodes", default=1), given.get("nproc_per_node")
    if not isinstance(local, int):
        return None
    shares = [given.integer(f"{axis}_parallel_size", default=1) for axis in ("tensor_model", "pipeline_model", "context")]
    ranks, rest = divmod(nodes * local, math.prod(shares))
    return None if rest else ranks


def _parallel(given: Given, say: Say) -> dict[str, Any]:
    tp, pp = (given.integer(f"{axis}_model_parallel_size", default=1) for axis in ("tensor", "pipeline"))
    cp, ep = given.integer("context_parallel_size", default=1), given.integer("expert_model_parallel_size", default=1)
    etp = 1 if given.on("moe_tp_extend_ep") else given.integer("expert_tensor_parallel_size", default=tp)
    values: dict[str, Any] = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
    values |= {"etp": etp} if given.integer("num_experts") and etp > 1 else {}
    if given.on("use_distributed_optimizer", "use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"):
        values["dp_shard"] = -1
        values |= {} if given.on("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2") else {"reshard_after_forward": False}
    elif (ranks := _data_ranks(given)) is not None:
        values["dp_replicate"] = ranks
    else:
        say("the number of ranks is not known: set parallel.dp_replicate to that of replicas")
    values |= _pipeline(given, pp, say) | _context(given, say)
    if given.on("moe_hierarchical_alltoallv"):
        values["ep_kind"] = "hierarchical"
    if (minutes := given.number("distributed_timeout_minutes")) is not None:
        values["timeout"] = minutes * 60
    return {key: value for key, value in values.items() if value is True or value != 1}


def _pipeline(given: Given, pp: int, say: Say) -> dict[str, Any]:
    values: dict[str, Any] = {}
    each, virtual = given.integer("num_layers_per_virtual_pipeline_stage"), given.integer("num_virtual_stages_per_pipeline_rank")
    if each is not None:
        virtual = given.required("num_layers") // pp // each
    if virtual not in (None, 1):
        values["virtual_stages"] = virtual
    if (kind := given.get("schedules_method")) is not None:
        if kind == "dualpipev":
            values["schedule"] = kind
        else:
            say(f"{flag('schedules_method', kind)}: see parallel.schedule")
    if given.on("moe_fb_overlap", "overlap_moe_expert_parallel_comm"):
        values["overlap_micro_batches"] = True
    for name in (
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
        "pipeline_model_parallel_layout",
        "num_layer_list",
    ):
        if (layout := given.get(name)) is not None:
            say(f"{flag(name, layout)}: parallel.layers_per_stage says which stage has how many blocks")
    return values


def _context(given: Given, say: Say) -> dict[str, Any]:
    if given.integer("context_parallel_size", default=1) == 1:
        given.get("cp_comm_type", "context_parallel_algo")
        return {}
    kind = given.get("context_parallel_algo", "cp_comm_type", default="p2p")
    kinds = {"p2p": "ring", "megatron_cp_algo": "ring", "a2a": "ulysses", "ulysses_cp_algo": "ulysses", "all_gather": "all_gather"}
    if kind not in kinds:
        say(f"context parallelism {kind}: there are all_gather, ring and ulysses (parallel.cp_kind)")
    return {"cp_kind": kinds[kind]} if kind in kinds else {}


def _precision(given: Given, say: Say) -> dict[str, Any]:
    compute = "bf16" if given.on("bf16") else "fp16" if given.on("fp16") else "fp32"
    values: dict[str, Any] = {"compute": compute}
    if given.on("grad_reduce_in_bf16"):
        values |= {"reduce": "bf16", "accumulate": "bf16"}
    if (form := given.get("fp8_format", "fp8", "fp4_format")) is not None:
        say(f"fp8 {form}: products are in {compute} (precision.compute)")
    scale = {
        "init": given.number("initial_loss_scale"),
        "growth_every": given.integer("loss_scale_window"),
        "min": given.number("min_loss_scale"),
    }
    given_scale = {key: value for key, value in scale.items() if value is not None}
    if given.get("loss_scale") is not None:
        say("--loss-scale: the scale of fp16 is dynamic (precision.loss_scale)")
    return values | ({"loss_scale": given_scale} if compute == "fp16" and given_scale else {})


def _checkpoint(given: Given, say: Say) -> dict[str, Any]:
    values: dict[str, Any] = {"every": given.integer("save_interval", default=0)}
    values["asynchronous"] = given.on("async_save")
    if given.on("no_save_optim"):
        say("--no-save-optim: checkpoints always hold the moments")
    return values


def _metrics(given: Given) -> dict[str, Any]:
    values: dict[str, Any] = {"every": given.integer("log_interval", default=100)}
    values |= {"tensorboard": True} if given.get("tensorboard_dir") is not None else {}
    values |= {"wandb": str(given.get("wandb_project"))} if given.get("wandb_project") is not None else {}
    if given.on("profile"):
        start, end = given.integer("profile_step_start", default=10), given.integer("profile_step_end", default=12)
        values["profile"] = {"start": start, "steps": max(1, end - start)}
    return values


def _schedule(given: Given, train: dict[str, Any], say: Say) -> dict[str, Any]:
    style, batch, steps = given.get("lr_decay_style", default="linear"), train.get("global_batch"), train.get("steps")
    warmup = _in_steps(given, "lr_warmup", batch) or 0
    decay = _in_steps(given, "lr_decay", batch)
    if (share := given.number("lr_warmup_fraction")) is not None and (decay or steps):
        warmup = round(share * (decay or steps))
    values: dict[str, Any] = {"warmup_steps": warmup} if warmup else {}
    if style == "constant":
        return values | {"kind": "constant"}
    if decay is not None and steps is not None and decay != steps:
        say(f"a decay over {decay} of {steps} steps: the schedule ends with the run, or the phase (train.phases)")
    values["final_lr"] = given.number("min_lr", default=0.0)
    if style == "WSD":
        return values | {"kind": "wsd"} | _wsd(given, batch, steps, warmup, say)
    if style not in ("cosine", "linear"):
        say(f"--lr-decay-style {style}: there are cosine, wsd and constant (schedule.kind)")
        return values
    return values | ({"kind": "cosine"} if style == "cosine" else {"kind": "wsd", "decay_fraction": 1.0})


def _wsd(given: Given, batch: int | None, steps: int | None, warmup: int, say: Say) -> dict[str, Any]:
    curve, last = given.get("lr_wsd_decay_style", default="exponential"), _in_steps(given, "lr_wsd_decay", batch)
    if curve != "linear":
        say(f"{flag('lr_wsd_decay_style', curve)}: schedule.kind wsd goes down in a straight line")
    return {"decay_fraction": last / (steps - warmup)} if last and steps else {}


def _in_steps(given: Given, name: str, batch: int | None) -> int | None:
    """`--NAME-iters`, or `--NAME-samples` in steps."""
    steps, samples = given.integer(f"{name}_iters"), given.integer(f"{name}_samples")
    return steps if samples is None or batch is None else -(-samples // batch)
