"""Published command lines of Megatron-LM and MindSpeed-LLM, translated, are the models that they train."""

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.yamlfile import scalar
from llmtrain.convert.megatron_arguments import layer_pattern, read_words
from llmtrain.convert.megatron_yaml import translate
from llmtrain.errors import UserError
from llmtrain.tools.config import main

DENSE = "--swiglu --normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear"
NO_DROPOUT = "--attention-dropout 0.0 --hidden-dropout 0.0"
TRAINING = "--micro-batch-size 1 --global-batch-size 128 --train-iters 100 --lr 1e-4 --lr-decay-style cosine --data-path /data/x"

# Megatron-LM's examples for Llama 3 8B, but for its RoPE base (1,000,000 there), and the values of Meta's params.json.
LLAMA3 = (
    f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    f"--kv-channels 128 --seq-length 8192 --max-position-embeddings 8192 --rotary-base 500000 --vocab-size 128256 "
    f"{DENSE} {NO_DROPOUT} {TRAINING}"
)
# Megatron-LM's example for Mixtral 8x7B.
MIXTRAL = (
    f"--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    f"--seq-length 4096 --max-position-embeddings 32768 --rotary-base 1000000 --vocab-size 32000 --num-experts 8 --moe-router-topk 2 "
    f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm {DENSE} {NO_DROPOUT} {TRAINING}"
)
# Scripts around Qwen3-30B-A3B that drive Megatron.
QWEN3_MOE = (
    f"--num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 32 --group-query-attention --num-query-groups 4 "
    f"--kv-channels 128 --qk-layernorm --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768 --moe-layer-freq [1]*48 "
    f"--moe-aux-loss-coeff 0 --vocab-size 151936 --max-position-embeddings 40960 --rotary-base 1000000 --norm-epsilon 1e-6 "
    f"{DENSE} {NO_DROPOUT} {TRAINING}"
)
# MindSpeed-LLM's example for DeepSeek-V3 671B.
DEEPSEEK3 = (
    "torchrun --nproc_per_node 8 --nnodes 64 pretrain_gpt.py --multi-head-latent-attention --qk-rope-head-dim 64 --qk-nope-head-dim 128 "
    "--q-lora-rank 1536 --kv-lora-rank 512 --v-head-dim 128 --qk-layernorm --mla-fa-without-pad --router-gating-in-fp32 "
    "--moe-grouped-gemm --moe-token-dispatcher-type alltoall_seq --first-k-dense-replace 3 --moe-layer-freq 1 --n-shared-experts 1 "
    "--num-experts 256 --moe-router-topk 8 --moe-intermediate-size 2048 --moe-router-load-balancing-type noaux_tc --n-group 8 "
    "--topk-group 4 --routed-scaling-factor 2.5 --moe-aux-loss-coeff 0.0001 --seq-aux --norm-topk-prob --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-tp-extend-ep --mtp-num-layers 1 --mtp-loss-scaling-factor 0.3 --rope-scaling-beta-fast 32 "
    "--rope-scaling-beta-slow 1 --rope-scaling-factor 40 --rope-scaling-mscale 1.0 --rope-scaling-mscale-all-dim 1.0 "
    "--rope-scaling-original-max-position-embeddings 4096 --rope-scaling-type yarn --moe-fb-overlap --schedules-method dualpipev "
    "--swap-optimizer --use-distributed-optimizer --recompute-method uniform --recompute-granularity full --recompute-num-layers 1 "
    "--noop-layers 61,62,63 --use-flash-attn --tensor-model-parallel-size 4 --pipeline-model-parallel-size 8 "
    "--expert-model-parallel-size 8 --sequence-parallel --num-layers 64 --hidden-size 7168 --ffn-hidden-size 18432 "
    "--num-attention-heads 128 --seq-length 4096 --max-position-embeddings 163840 --micro-batch-size 1 --global-batch-size 3840 "
    "--lr 1.0e-5 --train-iters 2000 --lr-decay-style cosine --min-lr 1.0e-7 --weight-decay 1e-2 --lr-warmup-iters 500 --clip-grad 1.0 "
    "--vocab-size 129280 --rotary-base 10000 --norm-epsilon 1e-6 --no-load-optim --bf16 --distributed-timeout-minutes 120 "
    f"--data-path /data/x --split 100,0,0 {DENSE} {NO_DROPOUT}"
)
MODELS = {"llama3_8b": LLAMA3, "mixtral_8x7b": MIXTRAL, "qwen3_30b_a3b": QWEN3_MOE, "deepseek_v3": DEEPSEEK3}


def settled(model: ModelConfig) -> ModelConfig:
    """The model without what a recipe of training chooses, and with derived widths written out."""
    own = {"preset": None, "init": None, "mtp": None}
    if model.ffn.kind == "moe":
        own["ffn"] = model.ffn.model_copy(update={"balance": None})
    if model.attention.kind == "gqa":
        own["attention"] = model.attention.model_copy(update={"head_dim": model.head_dim})
    return model.model_copy(update=own)


@pytest.mark.parametrize("preset", MODELS)
def test_published_arguments_are_the_published_model(preset):
    found = translate(MODELS[preset].split())
    model, published = ModelConfig.model_validate(found.values["model"]), ModelConfig(preset=preset)
    assert settled(model) == settled(published)
    assert RunConfig.load(found.values).model == model and not found.unknown


def test_a_large_run():
    found = translate(DEEPSEEK3.split())
    run = RunConfig.load(found.values)
    assert run.parallel.tp == 4 and run.parallel.pp == 8 and run.parallel.ep == 8 and run.parallel.etp == 1
    assert run.parallel.schedule == "dualpipev" and run.parallel.overlap_micro_batches and run.parallel.dp_shard == -1
    assert run.optim.offload and run.train.recompute == "full" and run.parallel.timeout == 7200
    assert run.schedule.warmup_steps == 500 and run.schedule.final_lr == 1e-7 and run.precision.compute == "bf16"
    assert run.model.mtp.loss_weight == 0.3 and run.model.ffn.balance.sequences == 1 and run.model.ffn.balance.weight == 1e-4
    assert any("noop-layers" in text for text in found.differing) and any("mtp" in text for text in found.differing)
    assert any("--use-flash-attn" in word for word in found.unneeded)


def test_what_is_not_given_has_megatrons_default():
    values = translate(["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "99", "--lr", "1e-3"])
    run = RunConfig.load(values.values)
    assert run.model.norm.kind == "layer_norm" and run.model.position.kind == "learned" and run.model.tie_embeddings
    assert run.model.ffn.hidden == 256 and run.model.ffn.activation == "gelu" and run.model.ffn.bias and run.model.attention.out_bias
    assert run.optim.betas == (0.9, 0.999) and run.optim.weight_decay == 0.01 and "*norm.weight" in run.optim.no_decay
    assert run.schedule.kind == "wsd" and run.schedule.decay_fraction == 1.0 and run.schedule.final_lr == 0.0
    assert [text for text in values.differing if "dropout" in text and "default" in text]
    assert not run.data.document_mask and run.metrics.every == 100


def test_words_of_a_run():
    words = (
        f"{LLAMA3} --bf16 --grad-reduce-in-bf16 --context-parallel-size 2 --cp-comm-type a2a --lr-warmup-fraction 0.05 "
        "--squared-relu --recompute-granularity selective --recompute-modules layernorm moe_act mlp --save /runs/one --save-interval 7 "
        "--fp8-format hybrid "
        "--train-data-path 0.3 /a 0.7 /b --valid-data-path /c --reset-attention-mask --eval-interval 50 --eval-iters 2 "
        "--num-layers-per-virtual-pipeline-stage 4 --pipeline-model-parallel-size 4 --not-an-option 3 --log-interval 5"
    )
    found = translate([word for word in words.split() if word not in ("--data-path", "/data/x")])
    run = RunConfig.load(found.values)
    assert run.precision.reduce == run.precision.accumulate == "bf16" and run.parallel.cp_kind == "ulysses"
    assert run.schedule.warmup_steps == 5 and run.train.recompute == ["norms", "activation"] and run.parallel.virtual_stages == 2
    assert (run.output, run.name, run.checkpoint.every) == ("/runs", "one", 7)
    assert [(source.path, source.weight) for source in run.data.train] == [("/a", 0.3), ("/b", 0.7)] and run.data.document_mask
    assert run.train.validate_every == 50 and run.train.validate_samples == 2 * 128
    assert found.unknown == ["--not-an-option 3"]
    assert {"fp8 hybrid", "--squared-relu", "--recompute-modules mlp"} <= {text.partition(":")[0] for text in found.differing}


def test_a_ramp_of_batches():
    found = translate(f"{LLAMA3} --rampup-batch-size 32 32 3000 --train-samples 10000".split())
    (phase,) = RunConfig.load(found.values).train.phases
    assert [(entry.from_tokens, entry.size) for entry in phase.batch] == [(n * 1000 * 8192, 32 * (n + 1)) for n in range(4)]
    assert phase.tokens == 10_000 * 8192


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layers 4 --hidden-size $HIDDEN", "shell variable"),
        ("4 --num-layers 4", "belongs to no option"),
        ("--hidden-size 64", "--num-layers is missing"),
        ("--num-layers four", "--num-layers four is not allowed"),
        ("--num-layers 4 --hidden-size 8 --num-attention-heads 2 --num-experts 4 --moe-layer-freq [1]*3", "a pattern of 3 layers"),
        ("--num-layers 4 --hidden-size 8 --num-attention-heads 2 --num-experts 4 --moe-layer-freq __import__('os')", "allowed are"),
    ],
)
def test_words_without_sense_are_refused(words, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("$", r"\$")):
        translate(words.split())


def test_patterns_of_layers():
    assert layer_pattern("([0]*2+[1]*3)", 5) == [False, False, True, True, True] == layer_pattern([0, 0, 1, 1, 1], 5)
    assert layer_pattern("[0,1]*2", 4) == [False, True] * 2 == layer_pattern("([0,1]*2)", 4)
    assert layer_pattern(2, 4) == [True, False] * 2


def test_the_last_of_two_counts():
    assert read_words(["python", "pretrain_gpt.py", "--lr", "1", "--lr=2", "--bf16"]) == {"lr": 2, "bf16": True}


def test_the_verb_prints_yaml_that_a_run_accepts(capsys, tmp_path):
    assert main(["from-megatron", *MIXTRAL.split()]) == 0
    out, err = capsys.readouterr()
    (tmp_path / "run.yaml").write_text(out)
    assert RunConfig.load(tmp_path / "run.yaml").model.ffn.experts == 8
    assert "needs no option: --moe-grouped-gemm" in err and scalar(out)["train"]["global_batch"] == 128
