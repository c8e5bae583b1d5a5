"""The parity matrix as data: meshes, models and options that must train as one process does. `quick` rows run in every test run."""

from dataclasses import dataclass, field

from llmtrain.config.train import ParallelConfig
from llmtrain.layout.mesh import MeshShape

LAYERS_4 = {"layers": 4}
MODELS = {
    "GQA": {},
    "MHA": {"attention": {"kv_heads": 4}},
    "4 layers": LAYERS_4,
    "tied": {"tie_embeddings": True},
    "4 layers, tied": {"tie_embeddings": True} | LAYERS_4,
    "MTP": {"mtp": {"heads": 1}},
    "MTP 2, tied": {"mtp": {"heads": 2}, "tie_embeddings": True},
    "MoE": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}},
    "MoE, 4 layers": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}} | LAYERS_4,
    "latent MoE": {
        "attention": {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
        "ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "shared_experts": 1},
    },
    "balanced MoE": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "balance": {"weight": 0.1, "sequences": "step"}}},
    "DeepSeek": {
        "attention": {"kind": "mla", "heads": 4, "query_rank": 12, "kv_rank": 10, "nope_dim": 8, "rope_dim": 4, "value_dim": 6},
        "ffn": {
            "kind": "moe",
            "experts": 8,
            "top_k": 2,
            "hidden": 16,
            "shared_experts": 1,
            "dense_layers": 1,
            "dense_hidden": 48,
            "router": {"score": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "bias_rate": 0.01, "z_loss": 0.001},
            "balance": {"weight": 0.05, "sequences": 1},
        },
        "mtp": {"heads": 1},
    },
    "BigMac": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 32, "descend": 8, "activation": "gelu", "bias": True}},
    "BigMac, shared": {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16, "descend": 16, "shared_experts": 1}},
    "MoE, full groups": {
        "ffn": {
            "kind": "moe",
            "experts": 4,
            "top_k": 2,
            "hidden": 16,
            "router": {"bias_rate": 0.01},
            "balance": {"weight": 0.1, "sequences": 4},
            "capacity": {"factor": 1.0, "sequences": 2},
        }
    },
    "GPT": {
        "position": {"kind": "learned"},
        "max_seq_len": 32,
        "norm": {"kind": "layer_norm", "placement": "pre"},
        "attention": {"qkv_bias": True, "out_bias": True, "qk_norm": False},
        "ffn": {"activation": "gelu", "bias": True},
    },
}
"""What differs from `sameness.MODEL` (3 layers, 4 heads, 2 key/value heads, sandwich norm, untied), by name."""
RANKS_1 = "one rank"
NUDGES = range(5)


@dataclass(frozen=True)
class Row:
    """One line of the matrix."""

    parallel: dict
    model: str = "GQA"
    options: dict = field(default_factory=dict)
    """Dotted options beside the mesh's axes."""
    whole: bool = False
    """Rows of one document each, where all others are packed documents."""
    quick: str = ""
    """What every test run does of it: `short`, the first steps in float64; `fp64`, all steps; `both`, in float32 too; or nothing."""

    @property
    def shape(self) -> MeshShape:
        return MeshShape.from_config(ParallelConfig(**self.parallel))

    @property
    def mesh(self) -> str:
        etp = f", etp {self.shape.etp}" if self.shape.etp > 1 else ""
        return self.shape.describe() + etp

    @property
    def details(self) -> str:
        words = [f"{key.split('.')[-1]} {value}" for key, value in self.options.items()]
        return ", ".join([*words, *["one document a row"] * self.whole])

    @property
    def name(self) -> str:
        return "; ".join(part for part in (self.mesh, self.model, self.details) if part)

    @property
    def reference(self) -> str:
        """The one-process runs that this row is compared with."""
        return self.model + "; one document a row" * self.whole

    def scenario(self, precision: str, **extra) -> dict:
        """What `sameness.train` is told."""
        changes: dict = {"model": MODELS[self.model], "parallel": dict(self.parallel), "precision": precision}
        for key, value in self.options.items():
            section, name = key.split(".")
            changes.setdefault(section, {})[name] = value
        return {"changes": changes, "whole": self.whole, **extra}


def references(row: Row) -> dict[str, dict]:
    """The one-process scenarios of `row`, by name: float64, float32, float32 with each step's samples in another order, and float32 from
    initial weights that are each moved by one unit of rounding."""
    alone = Row({}, row.model, whole=row.whole)
    kinds = {"fp64": ("fp64", {}), "fp32": ("fp32", {}), "control": ("fp32", {"permute": True})}
    kinds |= {f"nudged {seed}": ("fp32", {"nudged": seed}) for seed in NUDGES}
    return {f"{row.reference} | {kind}": alone.scenario(precision, **extra) for kind, (precision, extra) in kinds.items()}


def schedule(kind: str, virtual: int = 1, layers: list[int] | None = None) -> dict:
    options = {"parallel.schedule": kind} | ({"parallel.virtual_stages": virtual} if virtual > 1 else {})
    return options | ({"parallel.layers_per_stage": layers} if layers else {})


ACCUMULATE = {"train.micro_batch": 1}
FULL, SELECTIVE = ({"train.recompute": kind} for kind in ("full", "selective"))
CHUNKS = {"parallel.tp_chunks": 3}
NAMED = {"train.recompute": ["mla_up", "norms", "activation", "permute"]}
AWAY = {"train.offload": ["block_input", "expert_output"], "optim.offload": True}
RING, ULYSSES = ({"parallel.cp_kind": kind} for kind in ("ring", "ulysses"))
GROUPS = "MoE, full groups"
NODES, OVERLAP = {"parallel.ep_kind": "hierarchical"}, {"parallel.overlap_micro_batches": True}

ONE = [
    Row({}, options=FULL, quick="short"),
    Row({}, options=SELECTIVE, quick="short"),
    Row({}, options={"train.micro_batch": 8}, quick="fp64"),
    Row({}, options=ACCUMULATE),
    Row({}, "MoE", FULL),
]
DATA = [
    Row({"dp_shard": 2}, quick="both"),
    Row({"dp_shard": 2}, options=ACCUMULATE, quick="fp64"),
    Row({"dp_shard": 2}, options={"train.micro_batch": 4}, quick="short"),
    Row({"dp_shard": 2}, options=FULL, quick="short"),
    Row({"dp_shard": 2}, options=SELECTIVE | ACCUMULATE, quick="short"),
    Row({"dp_shard": 2}, options={"parallel.reshard_after_forward": False}, quick="short"),
    Row({"dp_shard": 2}, "tied", quick="fp64"),
    Row({"dp_shard": 2}, "MHA"),
    Row({"dp_shard": 2}, "GPT"),
    Row({"dp_shard": 2}, "MTP"),
    Row({"dp_shard": 2}, "MoE"),
    Row({"dp_shard": 2}, whole=True),
    Row({"dp_replicate": 2}, quick="fp64"),
    Row({"dp_replicate": 2}, "MoE"),
    Row({"dp_shard": 4}, quick="both"),
    Row({"dp_shard": 4}, options=ACCUMULATE, quick="short"),
    Row({"dp_replicate": 2, "dp_shard": 2}, quick="both"),
    Row({"dp_replicate": 2, "dp_shard": 2}, "tied", ACCUMULATE | FULL, quick="short"),
]
TENSOR = [
    Row({"tp": 2}, quick="both"),
    Row({"tp": 2}, options=CHUNKS),
    Row({"tp": 2}, options=FULL),
    Row({"tp": 2}, options=SELECTIVE | CHUNKS),
    Row({"tp": 2}, "MHA"),
    Row({"tp": 2}, "tied"),
    Row({"tp": 2}, "GPT", quick="short"),
    Row({"tp": 2}, "MTP"),
    Row({"tp": 2}, "MoE"),
    Row({"tp": 2}, whole=True),
    Row({"tp": 4}, quick="short"),
    Row({"tp": 4}, options=CHUNKS),
    Row({"tp": 2, "dp_shard": 2}, quick="short"),
    Row({"tp": 2, "dp_shard": 2}, "GPT", CHUNKS | FULL),
    Row({"tp": 2, "dp_replicate": 2}, "tied"),
    Row({"tp": 2}, options=CHUNKS | {"train.recompute": ["norms", "activation"], "train.offload": ["block_input"]}),
    Row({"tp": 2}, "GPT", {"train.offload": ["attention_input", "ffn_input"]}),
]
PIPELINE = [
    Row({"pp": 2}, options=schedule("1f1b"), quick="both"),
    Row({"pp": 2}, options=schedule("gpipe")),
    Row({"pp": 2}, "4 layers", schedule("interleaved", 2), quick="short"),
    Row({"pp": 2}, options=schedule("zero_bubble"), quick="short"),
    Row({"pp": 2}, "4 layers", schedule("zero_bubble", 2)),
    Row({"pp": 2}, options=schedule("zbv", 2, [1, 1, 1, 0])),
    Row({"pp": 2}, "4 layers, tied", schedule("dualpipev", 2), quick="short"),
    Row({"pp": 2}, options=schedule("1f1b", layers=[1, 2]) | ACCUMULATE),
    Row({"pp": 2}, options=FULL),
    Row({"pp": 2}, "MHA"),
    Row({"pp": 2}, "GPT"),
    Row({"pp": 2}, "tied"),
    Row({"pp": 2}, "MTP"),
    Row({"pp": 2}, "MTP 2, tied", schedule("zbv", 2, [1, 1, 1, 0]) | ACCUMULATE, quick="short"),
    Row({"pp": 2}, "4 layers, tied", schedule("interleaved", 2)),
    Row({"pp": 2}, "MoE", schedule("zero_bubble")),
    Row({"pp": 2}, whole=True),
    Row({"pp": 4}, "4 layers", schedule("1f1b")),
    Row({"pp": 4}, "4 layers, tied", schedule("gpipe") | ACCUMULATE),
    Row({"pp": 2, "tp": 2}, "tied", ACCUMULATE, quick="short"),
    Row({"pp": 2, "tp": 2}, "4 layers", schedule("zero_bubble", 2) | CHUNKS),
    Row({"pp": 2, "dp_shard": 2}, "4 layers, tied", schedule("interleaved", 2) | ACCUMULATE),
    Row({"pp": 2, "dp_shard": 2}, "MTP", schedule("1f1b")),
    Row({"pp": 2, "dp_shard": 2}, "4 layers", schedule("dualpipev", 2) | ACCUMULATE),
    Row({"pp": 2, "cp": 2}, "MTP 2, tied", schedule("zbv", 2, [1, 1, 1, 0])),
]
CONTEXT = [
    Row({"cp": 2}, quick="both"),
    Row({"cp": 2}, options=RING, quick="short"),
    Row({"cp": 2}, options=ULYSSES, quick="short"),
    *(Row({"cp": 2}, options=kind, whole=True) for kind in ({}, RING, ULYSSES)),
    Row({"cp": 2}, "MHA", RING | FULL),
    Row({"cp": 2}, "GPT"),
    Row({"cp": 2}, "MTP", ULYSSES),
    Row({"cp": 2}, "MoE"),
    Row({"cp": 4}, options=RING),
    Row({"cp": 4}),
    Row({"dp_shard": 2, "cp": 2}, quick="short"),
    Row({"dp_shard": 2, "cp": 2}, "tied", RING | ACCUMULATE),
    Row({"dp_replicate": 2, "cp": 2}, options=ULYSSES),
    Row({"cp": 2, "tp": 2}, options=RING, quick="short"),
    Row({"cp": 2, "tp": 2}, "GPT"),
    Row({"cp": 2, "tp": 2}, options=ULYSSES | CHUNKS),
]
EXPERT = [
    Row({"dp_shard": 2, "ep": 2}, "MoE", quick="short"),
    Row({"dp_shard": 2, "ep": 2}, "MoE", ACCUMULATE | FULL),
    Row({"cp": 2, "ep": 2}, "MoE"),
    Row({"tp": 2, "ep": 2}, "MoE"),
    Row({"tp": 2, "etp": 2}, "MoE", quick="short"),
    Row({"tp": 4, "ep": 2}, "MoE", quick="short"),  # the only ranks that share parameters are those of the same experts
    Row({"dp_shard": 4, "ep": 2}, "MoE"),
    Row({"dp_shard": 4, "ep": 4}, "MoE"),
    Row({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, "MoE"),
    Row({"dp_shard": 2, "tp": 2, "ep": 4}, "MoE"),
    Row({"dp_shard": 2, "tp": 2, "ep": 2}, "MoE"),
    Row({"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2}, "MoE"),
    Row({"dp_shard": 2, "cp": 2, "ep": 4}, "MoE", RING),
    Row({"dp_shard": 2, "ep": 2}, GROUPS, quick="short"),
    Row({"tp": 2}, GROUPS, quick="short"),
    Row({"cp": 2}, GROUPS, quick="short"),
    Row({"cp": 2, "tp": 2, "ep": 2}, GROUPS, FULL | RING, quick="short"),
    Row({"pp": 2, "dp_shard": 2}, GROUPS, schedule("1f1b")),
    Row({"dp_shard": 2, "tp": 2, "ep": 4}, "MoE", NODES, quick="short"),
    Row({"dp_shard": 4, "ep": 4}, "MoE", NODES | {"parallel.ep_inner": 2} | FULL),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "MoE, 4 layers", schedule("1f1b")),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "MoE, 4 layers", schedule("interleaved", 2) | ACCUMULATE),
    Row({"pp": 2, "tp": 2, "ep": 2}, "MoE", schedule("1f1b"), quick="short"),
    Row({"dp_shard": 2, "ep": 2}, "latent MoE", NAMED | AWAY, quick="short"),
    Row({"pp": 2}, "latent MoE", schedule("zero_bubble") | NAMED | AWAY, quick="short"),
    Row({"tp": 2, "ep": 2}, "latent MoE", NAMED | AWAY | ACCUMULATE),
    Row({"tp": 2, "etp": 2}, "latent MoE", NAMED),
    *(Row({"cp": 2}, "latent MoE", kind | NAMED) for kind in ({}, RING, ULYSSES)),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "latent MoE", schedule("zbv", 2, [1, 1, 1, 0]) | NAMED | AWAY),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "latent MoE", schedule("dualpipev", 2, [1, 1, 1, 0]) | ACCUMULATE | OVERLAP | NAMED | AWAY),
    Row({"dp_shard": 4, "ep": 4}, "latent MoE", NODES | {"parallel.ep_inner": 2} | NAMED | AWAY),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "MoE, 4 layers", schedule("dualpipev", 2) | ACCUMULATE | OVERLAP, quick="short"),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "MoE, 4 layers", schedule("interleaved", 2) | ACCUMULATE | OVERLAP),
]
MIXTURES = [
    Row({}, "balanced MoE", {"train.micro_batch": 8}, quick="fp64"),
    Row({}, "balanced MoE", FULL, quick="short"),
    Row({"dp_shard": 2, "ep": 2}, "balanced MoE", quick="short"),
    Row({"dp_shard": 4, "ep": 4}, "balanced MoE"),
    Row({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, "balanced MoE", ACCUMULATE),
    Row({"tp": 2, "ep": 2}, "balanced MoE", quick="short"),
    Row({"cp": 2, "ep": 2}, "balanced MoE", RING),
    Row({"pp": 2}, "DeepSeek"),
    Row({"dp_shard": 2, "ep": 2}, "DeepSeek", quick="short"),
    Row({"tp": 2}, "DeepSeek", quick="short"),
    Row({"cp": 2}, "DeepSeek", RING, quick="short"),
    Row({"cp": 2, "ep": 2}, "DeepSeek"),
    Row({"cp": 2}, "DeepSeek", ULYSSES),
    Row({"dp_shard": 2, "tp": 2, "ep": 4}, "DeepSeek", FULL),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "DeepSeek", schedule("1f1b"), quick="short"),
    Row({"pp": 2, "tp": 2, "ep": 2}, "DeepSeek", schedule("zbv", 2, [1, 1, 1, 0])),
    Row({"dp_shard": 2, "ep": 2}, "BigMac", quick="short"),
    Row({"tp": 2, "ep": 2}, "BigMac"),
    Row({"pp": 2, "dp_shard": 2, "ep": 2}, "BigMac"),
]
EIGHT = [
    Row({"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2}, "MoE"),
    Row({"pp": 2, "dp_shard": 2, "tp": 2, "ep": 4}, "MoE", schedule("zbv", 2, [1, 1, 1, 0]) | ACCUMULATE),
    Row({"pp": 2, "dp_shard": 2, "tp": 2}, "4 layers, tied", schedule("interleaved", 2) | ACCUMULATE),
    Row({"dp_shard": 2, "cp": 2, "tp": 2}, "MTP", RING),
]
ROWS = [*ONE, *DATA, *TENSOR, *PIPELINE, *CONTEXT, *EXPERT, *MIXTURES, *EIGHT]

FAULTS = {
    "count": Row({"dp_shard": 2}),
    "sync": Row({"dp_shard": 2}, options=ACCUMULATE),
    "tp sum": Row({"tp": 2}),
    "cp merge": Row({"cp": 2}, options=RING, whole=True),
    "embedding copy": Row({"pp": 2}, "tied"),
    "expert order": Row({"dp_shard": 2, "ep": 2}, "MoE"),
    "holders": Row({"tp": 2, "etp": 2}, "MoE"),
}
"""Faults of `sameness.FAULTS`, and the row that each must spoil."""
