"""What the engine megatron is compared in, beside one native process: rows as those of `parity_rows`."""

from parity_rows import ACCUMULATE, FULL, MODELS, RING, ULYSSES, Row, schedule

MODELS |= {
    "MLA": {"attention": MODELS["latent MoE"]["attention"]},
    "MLA, no query rank": {"attention": MODELS["latent MoE"]["attention"] | {"query_rank": None}},
    "pre-norm": {"norm": {"placement": "pre"}},
    "grouped MoE": {
        "ffn": {
            "kind": "moe",
            "experts": 8,
            "top_k": 4,
            "hidden": 16,
            "shared_experts": 1,
            "dense_layers": 1,
            "dense_hidden": 48,
            "router": {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "bias_rate": 0.01},
        }
    },
}
ROWS = [
    Row({}),
    Row({}, options=FULL),
    Row({}, "pre-norm"),
    Row({}, "grouped MoE", ACCUMULATE),
    Row({"dp_replicate": 2}, options=ACCUMULATE),
    Row({"dp_shard": 2}),
    Row({"dp_shard": 2}, "tied"),
    Row({"tp": 2}),
    Row({"tp": 2}, "MHA", FULL),
    Row({"tp": 2}, "GPT"),
    Row({"tp": 2}, "tied"),
    Row({"tp": 2}, "MLA"),
    Row({"tp": 2}, "MLA, no query rank"),
    Row({"pp": 2}, options=schedule("1f1b") | ACCUMULATE),
    Row({"pp": 2}, options=schedule("1f1b", layers=[1, 2]) | FULL),
    Row({"pp": 2}, "4 layers, tied", schedule("interleaved", 2)),
    Row({"pp": 2}, "latent MoE"),
    Row({"cp": 2}),
    Row({"cp": 2}, "MLA", RING),
    Row({"cp": 2}, options=ULYSSES, whole=True),
    Row({"dp_shard": 2, "ep": 2}, "MoE"),
    Row({"dp_replicate": 2, "ep": 1}, "grouped MoE"),
    Row({"tp": 2, "ep": 2}, "MoE"),
    Row({"tp": 2, "etp": 2}, "MoE"),
    Row({"dp_shard": 2, "ep": 2}, "BigMac, shared"),
    Row({"tp": 2}, "BigMac, shared"),
    Row({"dp_shard": 2, "tp": 2}, "MLA"),
    Row({"pp": 2, "tp": 2}, "4 layers, tied", schedule("interleaved", 2) | ACCUMULATE),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "MoE, 4 layers", schedule("1f1b")),
    Row({"dp_shard": 2, "tp": 2, "ep": 4}, "grouped MoE"),
    Row({"pp": 2, "tp": 2, "ep": 2}, "latent MoE"),
    Row({"cp": 2, "tp": 2}, options=RING),
]
