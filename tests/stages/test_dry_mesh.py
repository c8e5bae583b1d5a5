"""The dry mesh: groups by arithmetic, roles built in a world that is not there, and what `--dry-run` prints of both."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from groups_made import expected, groups_made
from sameness import BASE, merge

from llmtrain.config.load import load
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import count_parameters
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import AXES, EXPERT_AXES, Group, MeshShape
from llmtrain.layout.shards import Shards
from llmtrain.layout.steps import StepPlan
from llmtrain.layout.traffic import traffic
from llmtrain.parallel.check import check_parallel
from llmtrain.stages import dry_mesh, pretrain
from llmtrain.stages.dry_mesh import build_role, build_roles, check_groups, role_ranks
from llmtrain.stages.dry_run import miniature

ROOT = Path(__file__).parents[2]
MOE = {"ffn": {"kind": "moe", "experts": 4, "top_k": 2, "hidden": 16}}
SHARED = {"shared_experts": 1, "dense_layers": 1, "dense_hidden": 40}
LATENT = {"kind": "mla", "heads": 4, "query_rank": 20, "kv_rank": 12, "nope_dim": 8, "rope_dim": 4, "value_dim": 6}
DEEPSEEK = {"ffn": MOE["ffn"] | SHARED, "attention": LATENT}
BIGMAC = {"ffn": MOE["ffn"] | {"hidden": 32, "descend": 8, "activation": "gelu", "bias": True}}
MESHES = {
    "everything": ({}, {"pp": 2, "dp_shard": 2, "cp": 2, "tp": 2}),
    "uneven shards": ({"layers": 6}, {"pp": 3, "dp_shard": 5, "tp": 2, "virtual_stages": 2}),
    "replicas, few key heads": ({}, {"dp_replicate": 2, "dp_shard": 3, "tp": 4}),
    "experts over tp": (MOE, {"dp_shard": 4, "tp": 2, "ep": 4}),
    "experts split": (MOE, {"dp_shard": 2, "dp_replicate": 2, "tp": 2, "ep": 2, "etp": 2}),
    "experts by nodes": (MOE, {"dp_shard": 4, "tp": 2, "ep": 4, "ep_kind": "hierarchical"}),
    "tied": ({"tie_embeddings": True}, {"pp": 3, "dp_shard": 2, "tp": 2}),
    "mtp": ({"mtp": {"heads": 2}}, {"pp": 2, "dp_shard": 3}),
    "latent, shared experts": ({**DEEPSEEK, "mtp": {"heads": 1}}, {"pp": 2, "dp_shard": 4, "tp": 2, "ep": 4}),
    "bigmac": (BIGMAC, {"dp_shard": 3, "tp": 2, "ep": 2}),
}
COPIED = ("tied", "mtp", "latent, shared experts")


def resolved(name: str) -> tuple[RunConfig, MeshShape]:
    model, parallel = MESHES[name]
    cfg = RunConfig.model_validate(merge(BASE, {"model": model, "parallel": parallel}))
    return cfg, MeshShape.from_config(cfg.parallel)


@pytest.mark.parametrize("name", MESHES)
def test_distinct_shards_as_built_make_up_the_model(name):
    cfg, shape = resolved(name)
    total = Fraction(0)
    for rank in range(shape.world):
        role = build_role(cfg, shape, rank)
        total += Fraction(role.parameters - role.partial + Fraction(role.partial, shape.tp), shape.dp_replicate)
    copy = cfg.model.vocab_size * cfg.model.hidden if name in COPIED else 0
    assert total == count_parameters(cfg.model)["total"] + copy


def test_what_a_role_says():
    cfg, shape = resolved("everything")
    first, last = build_role(cfg, shape, 0), build_role(cfg, shape, 15)
    assert (first.pp, first.stages, first.ends) == (0, ((0, 2),), ("embedding",))
    assert (last.pp, last.stages, last.ends) == (1, ((1, 1),), ("final_norm", "head"))
    assert first.state_bytes == 16 * first.parameters  # four numbers of fp32


@pytest.mark.parametrize("name", MESHES)
def test_roles_are_all_of_pp_and_tp_at_both_ends_of_the_data_parallel_ranks(name):
    _, shape = resolved(name)
    places = [shape.place(rank) for rank in role_ranks(shape)]
    assert {(place["pp"], place["tp"]) for place in places} == {(p, t) for p in range(shape.pp) for t in range(shape.tp)}
    ends = {tuple(place[axis] for axis in ("dp_replicate", "dp_shard", "cp")) for place in places}
    assert ends == {(0, 0, 0), (shape.dp_replicate - 1, shape.dp_shard - 1, shape.cp - 1)}
    assert len(places) == shape.pp * shape.tp * len(ends)


@pytest.mark.parametrize("name", MESHES)
def test_the_group_of_a_rank_is_the_one_of_all_groups_that_it_is_in(name):
    _, shape = resolved(name)
    axes = check_groups(shape, experts=True)
    assert set(axes) == {*AXES, *EXPERT_AXES, "fsdp", *(("ep_outer", "ep_inner") if shape.ep_inner else ())}
    for axis, groups in axes.items():
        for group in groups:
            assert all(shape.group(axis, rank) == group for rank in group.ranks)


@pytest.mark.parametrize("name", MESHES)
def test_building_a_role_makes_all_groups_in_their_order_and_no_others(name):
    cfg, shape = resolved(name)
    for rank in role_ranks(shape):
        with groups_made() as made:
            build_role(cfg, shape, rank)
        assert made == expected(shape)


class Lossy(MeshShape):
    def groups(self, axis):
        return super().groups(axis)[: -1 if axis == "tp" else None]


def test_groups_that_do_not_part_the_world():
    with pytest.raises(RuntimeError, match="axis tp do not part the 8 ranks of dp_shard 4 x tp 2"):
        check_groups(Lossy(dp_shard=4, tp=2), experts=False)


def test_a_group_unlike_the_arithmetic(monkeypatch):
    cfg, shape = resolved("everything")
    monkeypatch.setattr(MeshShape, "group", lambda shape, axis, rank: Group(axis, (0,)))
    with pytest.raises(RuntimeError, match=r"rank 3: the mesh made another group of axis pp than \(0,\)"):
        build_role(cfg, shape, 3)


def test_a_size_unlike_the_arithmetic(monkeypatch):
    cfg, shape = resolved("everything")
    held = Shards.held
    monkeypatch.setattr(
        Shards, "held", lambda self: [one._replace(elements=one.elements + (one.name == "head.weight")) for one in held(self)]
    )
    build_role(cfg, shape, 0)  # has no head
    with pytest.raises(RuntimeError, match=r"rank 15 holds other parts than the arithmetic says of head.weight"):
        build_role(cfg, shape, 15)


def test_several_processes_build_the_same(monkeypatch):
    cfg, shape = resolved("everything")
    alone = build_roles(cfg, shape)
    monkeypatch.setattr(dry_mesh, "SEVERAL", 4)
    monkeypatch.setattr(dry_mesh, "allowed_cpus", lambda: {0, 1})
    assert build_roles(cfg, shape) == alone


TINY = """
device: cpu
model: {vocab_size: 61, layers: 6, hidden: 32, attention: {heads: 4, kv_heads: 2}, ffn: {hidden: 48}}
train: {steps: 20, seq_len: 24, global_batch: 16, micro_batch: 1}
parallel: {tp: 2, pp: 2, dp_shard: 2, virtual_stages: 2}
"""


@pytest.fixture
def dry(tmp_path, capsys):
    """Runs `train --dry-run` on TINY with these words, and returns what it prints."""

    def run(*words: str) -> str:
        (tmp_path / "tiny.yaml").write_text(TINY)
        assert pretrain.main(["-c", str(tmp_path / "tiny.yaml"), "--dry-run", *words]) == 0
        return capsys.readouterr().out

    return run


def test_what_a_dry_run_prints(dry, tmp_path):
    out = dry()
    assert "mesh of 8 ranks: pp 2 x dp_shard 2 x tp 2" in out
    assert re.search(r"^  fsdp +4 +2  0 2$", out, re.M) and re.search(r"^  pp +4 +2  0 4$", out, re.M)
    assert "every axis parts the 8 ranks" in out and "roles: 8 ranks built on meta in" in out
    counts = [int(n) for n in re.findall(r"^ +(\d+) +[01] +\S+ +\S+", out, re.M)]
    assert sum(counts) == 8 and len(counts) < 8  # equal ones are one line
    cfg = load(tmp_path / "tiny.yaml", []).run
    (segment,) = StepPlan.from_config(cfg).segments
    shape = MeshShape.from_config(cfg.parallel)
    most = max((traffic(cfg, shape, segment, rank=rank) for rank in range(8)), key=lambda rows: sum(row.bytes for row in rows))
    for row in most:
        assert re.search(rf"^  {row.axis} +{row.kind} +{row.calls} x ", out, re.M)
    assert re.search(r"^schedule interleaved, 4 stages of 1, 2 x 2, 1 blocks:$", out, re.M)
    assert re.search(r"^  phase-0 +16 x 24 +8 +\S+% +5\.9%", out, re.M)  # (p - 1) / (p - 1 + n v) = 1 / 17


def test_a_schedule_that_splits_backwards_says_so(dry):
    assert "zbv repeats collectives of tp, cp and ep" in dry("--parallel.schedule", "zbv")
    assert "repeats" not in dry("--parallel.schedule", "zbv", "--parallel.tp", "1")


def test_one_rank_has_no_mesh_to_speak_of(dry):
    out = dry(*(word for option in ("tp", "pp", "dp_shard", "virtual_stages") for word in (f"--parallel.{option}", "1")))
    assert "mesh of" not in out and "roles" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parallel.tp", "3"), r"parallel\.tp 3 does not divide model\.attention\.heads 4"),
        (("--parallel.dp_shard", "3"), r"16 sequences does not split over 3 data-parallel ranks"),
        (("--parallel.pp", "5"), r"model\.layers 6 is too few for 10 stages"),
        (
            ("--model.ffn.kind", "moe", "--model.ffn.balance.sequences", "4"),
            r"balance\.sequences 4 is 2 times the 2 sequences that are computed at once",
        ),
        (("--model.ffn.kind", "moe", "--model.ffn.balance.sequences", "3"), r"balance\.sequences 3 does not divide the 16 sequences"),
    ],
)
def test_impossible_meshes_are_refused(dry, words, message):
    with pytest.raises(UserError, match=message):
        dry(*words)


def test_a_miniature_has_what_the_model_has():
    model = ModelConfig(preset="deepseek_v3", mtp={"heads": 1}, ffn={"kind": "moe", "balance": {"sequences": 4}, "capacity": {"factor": 2}})
    small = miniature(model)
    assert [small.of_block(i).ffn.kind for i in range(2)] == ["dense", "moe"]
    assert (small.attention.kind, small.attention.query_rank, small.head_dim, small.value_head_dim) == ("mla", 32, 32, 16)
    assert (small.ffn.experts, small.ffn.shared_experts, small.ffn.router) == (256, 1, model.ffn.router)
    assert small.ffn.balance.sequences == small.ffn.capacity.sequences == 1 and small.ffn.capacity.factor == 2
    assert count_parameters(small)["total"] < 10_000_000
    assert miniature(ModelConfig(preset="gpt3_xl_bigmac")).ffn.descend == 16
    assert miniature(ModelConfig(preset="qwen3_8b")).attention.heads == 8  # four for each key head


# --- Pangu Ultra 135B on 8,192 devices: test_verbs_of_a_run.py builds every seventh role, docs/dry-mesh.md says how long all take --------


@pytest.fixture(scope="module")
def pangu():
    cfg = load(ROOT / "configs" / "pangu_ultra_135b.yaml", ["--device", "cpu"]).run
    return cfg, MeshShape.from_config(cfg.parallel)


def test_8192_ranks_hold_the_model_once(pangu):
    cfg, shape = pangu
    assert shape == MeshShape(pp=8, dp_shard=128, tp=8)
    total = 0
    for pp in range(8):
        for tp in range(8):
            shards = Shards(cfg, shape, rank=shape.rank(dict.fromkeys(AXES, 0) | {"pp": pp, "tp": tp}))
            weights = [weight for stage in shards.stages() for unit in shards.units(stage) for weight in unit.weights]
            once = [weight for weight in weights if weight.split or tp == 0]
            total += sum(weight.held(128, index) for weight in once for index in range(128))
    assert total == count_parameters(cfg.model)["total"] == 133_881_311_232


def test_roles_of_8192_ranks(pangu):
    cfg, shape = pangu
    with groups_made() as made:
        first = build_role(cfg, shape, 0)
    assert made == expected(shape) and len(made) == 2 * 8192 + 2 * 1024 + 2 * 64
    middle, last = (build_role(cfg, shape, rank) for rank in (3 * 1024 + 77, 8191))
    assert [sum(blocks for _, blocks in role.stages) for role in (first, middle, last)] == [12, 12, 10]
    assert [stage for stage, _ in last.stages] == [7, 15, 23, 31, 39, 47] and last.ends == ("final_norm", "head")
    block = 130_111_942_656 // 94 // 8  # a tp rank's part of one, norms aside
    assert middle.parameters == pytest.approx(12 * block / 128, rel=1e-3)


def test_all_groups_of_8192_ranks(pangu):
    _, shape = pangu
    axes = check_groups(shape, experts=False)
    assert {axis: len(groups) for axis, groups in axes.items() if len(groups[0].ranks) > 1} == {
        "pp": 1024,
        "dp_shard": 64,
        "tp": 1024,
        "fsdp": 64,
    }


def test_the_rows_of_long_context_go_on_where_the_short_ones_end(pangu):
    short = StepPlan.from_config(pangu[0])
    long_cfg = load(ROOT / "configs" / "pangu_ultra_135b_long.yaml", ["--device", "cpu"]).run
    plan, shape = StepPlan.from_config(long_cfg), MeshShape.from_config(long_cfg.parallel)
    assert plan.segments[: len(short.segments)] == short.segments and len(plan.phases) == 5
    assert long_cfg.name == pangu[0].name  # the same run folder, and so its checkpoints
    assert shape.world == pangu[1].world
    check_parallel(long_cfg, shape, plan, device="cpu")
