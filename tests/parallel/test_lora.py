"""Adapters beside frozen weights train the same on every mesh, and nothing but adapters is trained."""

import pytest
from parity_rows import MODELS
from sameness import BASE, gradient_difference, loss_difference, merge, norm_difference
from worlds import run_world

from llmtrain.config.run import RunConfig
from llmtrain.convert.adapters import is_adapter
from llmtrain.errors import UserError
from llmtrain.layout.mesh import MeshShape
from llmtrain.layout.steps import StepPlan
from llmtrain.parallel.check import check_parallel

STEPS = 4
LORA = {"rank": 4, "alpha": 16}
BIASED = {"attention": {"qkv_bias": True, "out_bias": True}, "tie_embeddings": True}
ONE_HEAD = {"attention": {"kv_heads": 1}}
LATENT = MODELS["latent MoE"]
EXPERTS = {"lora": LORA | {"targets": ["q_up", "kv_down", "kv_up", "o"]}}
PAIR = {"lora": LORA | {"targets": ["q", "v"]}}
RUNS: dict[str, tuple[dict, dict, dict]] = {
    "dp_shard 2": ({"dp_shard": 2}, BIASED, {"train": {"recompute": "full"}}),
    "tp 2": ({"tp": 2}, BIASED, {}),
    "tp 2, one key head": ({"tp": 2, "tp_chunks": 2}, ONE_HEAD, {}),
    "tp 2, latent": ({"tp": 2}, LATENT, EXPERTS),
    "ep 2, latent": ({"dp_shard": 2, "ep": 2}, LATENT, EXPERTS),
    "pp 2, tied": ({"pp": 2}, BIASED, {"optim": {"offload": True}}),
    "pp 2, backward in halves": ({"pp": 2, "schedule": "zero_bubble"}, BIASED, {}),
    "cp 2, two targets": ({"cp": 2, "cp_kind": "ring"}, BIASED, PAIR),
}
"""Mesh, model and options by name."""
BROKEN = {"tp sum": "tp 2", "count": "dp_shard 2", "holders": "tp 2"}
"""A run for each fault of `sameness.FAULTS` that must show."""


def changes(parallel: dict, model: dict, options: dict) -> dict:
    return merge({"model": model, "parallel": parallel, "precision": "fp64", "lora": LORA}, options)


def alone(name: str) -> str:
    """What the run of one process with the same model and adapters is called."""
    _, model, options = RUNS[name]
    return f"alone {model} {options.get('lora')}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    one, two = {}, {}
    for name, (parallel, model, options) in RUNS.items():
        adapters = {section: values for section, values in options.items() if section == "lora"}
        one[alone(name)] = {"changes": changes({}, model, adapters), "stop": STEPS}
        two[name] = {"changes": changes(parallel, model, options), "stop": STEPS}
    two |= {f"broken {fault}": two[name] | {"fault": fault} for fault, name in BROKEN.items()}
    found = run_world("sameness:train_all", 1, args={"scenarios": one}, folder=tmp_path_factory.mktemp("one"))
    return found | run_world("sameness:train_all", 2, args={"scenarios": two}, folder=tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", RUNS)
def test_float64_is_the_same_on_every_mesh(runs, name):
    run, one = runs[name], runs[alone(name)]
    assert loss_difference(run, one) < 1e-10
    assert gradient_difference(run, one) < 1e-9
    assert norm_difference(run, one) < 1e-9
    assert all(map(is_adapter, run["gradients"])), "frozen weights have gradients"
    assert len(set(one["losses"])) == STEPS


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_seen(runs, fault):
    run, one = runs[f"broken {fault}"], runs[alone(BROKEN[fault])]
    assert max(loss_difference(run, one), norm_difference(run, one)) > 1e-6


def test_what_does_not_fit_a_mesh_is_refused():
    values = merge(BASE, {"lora": LORA, "parallel": {"pp": 3, "layers_per_stage": [0, 2, 1]}})
    cfg = RunConfig.model_validate(values)
    shape, plan = MeshShape.from_config(cfg.parallel, world=3), StepPlan.from_config(cfg)
    with pytest.raises(UserError, match=r"stages \[0\] hold no block and so no adapter to train; set parallel.layers_per_stage"):
        check_parallel(cfg, shape, plan, device="cpu")
