"""A run that goes from engine to engine: bits of weights and moments that are carried, and losses of a run that trains on."""

from importlib.util import find_spec

import pytest
import worlds
from parity_rows import Row, references, schedule
from sameness import loss_difference

from llmtrain.packages import installed_version

FRESH = find_spec("deepspeed") is not None
"""As in test_megatron."""
pytestmark = pytest.mark.skipif(installed_version("megatron-core") is None, reason="megatron-core is not installed; make test-engines")
FACTOR = 5.0
CHAIN = [({"tp": 2}, {}), ({"dp_shard": 2}, {}), ({"pp": 2}, schedule("interleaved", 2))]
"""Meshes and options of the engine megatron, between one native process before and one after them."""
EXPERTS = [({"dp_shard": 2, "ep": 2}, {}), ({"tp": 2, "ep": 2}, {})]
STEPS = 3
RUNS = {
    "4 layers, tied, carried": ("4 layers, tied", CHAIN, 0),
    "MoE, 4 layers, carried": ("MoE, 4 layers", CHAIN + EXPERTS, 0),
    "4 layers, trained": ("4 layers", CHAIN, STEPS),
}
"""Model, stations in between, and the steps that each station takes, the last of which is saved and loaded by the next."""


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> dict[str, list[dict]]:
    """What each station of each run had and did."""
    folder = tmp_path_factory.mktemp("carried")
    stations: dict[str, list[tuple[str, dict, str]]] = {"native, first": [], "megatron": [], "native, last": []}
    for name, (model, chain, steps) in RUNS.items():
        where = ["native, first", *["megatron"] * len(chain), "native, last"]
        for index, (world, (mesh, options)) in enumerate(zip(where, [({}, {}), *chain, ({}, {})])):
            kind = world.partition(",")[0]
            changes = Row(mesh, model, options).scenario("fp32")["changes"] | {"engine": kind}
            source, target = (str(folder / f"{name} {number}") for number in (index - 1, index))
            case = {"changes": changes, "source": source if index else None, "target": target}
            stations[world].append((name, case | {"first": index * steps, "steps": steps or STEPS * (index == 0)}))
    found: dict[str, list[dict]] = {name: [] for name in RUNS}
    for world, cases in stations.items():
        theirs = world == "megatron"
        args = {"cases": [case for _, case in cases]}
        parts = worlds.run_world("megatron_world:carry_all", 2 if theirs else 1, args=args, folder=folder, fresh=FRESH and theirs)
        for (name, _), part in zip(cases, parts):
            found[name].append(part)
    return found


@pytest.mark.parametrize("name", [name for name in RUNS if "carried" in name])
def test_weights_and_moments_go_round_bit_for_bit(name, carried):
    first, *others = carried[name]
    start = first["after"]
    assert int(start["step"]) == STEPS and any(key.endswith("exp_avg_sq") and value.any() for key, value in start.items())
    assert len(others) == len(RUNS[name][1]) + 1
    for later in others:
        assert later["after"].keys() == start.keys()
        assert all(later["after"][key].tobytes() == start[key].tobytes() for key in start), "a bit has changed"


def test_a_run_goes_on_from_engine_to_engine(carried, tmp_path):
    losses = [loss for part in carried["4 layers, trained"] for loss in part["losses"]]
    scenarios = {name: scenario | {"stop": len(losses)} for name, scenario in references(Row({}, "4 layers")).items() if "fp64" not in name}
    runs = worlds.run_world("sameness:train_all", 1, args={"scenarios": scenarios}, folder=tmp_path)
    alone = runs.pop("4 layers | fp32")
    assert loss_difference({"losses": losses}, alone) <= FACTOR * max(loss_difference(other, alone) for other in runs.values())
