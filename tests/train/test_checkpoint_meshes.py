"""Saved under any mesh, loaded under any other: weights and moments bit for bit, the position exact, the losses of one process."""

import math

import numpy as np
import pytest
from checkpoint_world import AFTER, BEFORE
from parity_rows import Row, schedule
from worlds import run_world

from llmtrain.train.checkpoint_state import read_metadata

V = schedule("zbv", 2, [1, 1, 1, 0])
DENSE = {
    "one": Row({}, "tied"),
    "pp2": Row({"pp": 2}, "tied"),
    "pp2 host": Row({"pp": 2}, "tied", {"optim.offload": True}),
    "pp2 v": Row({"pp": 2}, "tied", V),
    "cp2": Row({"cp": 2}, "tied"),
    "dp4": Row({"dp_shard": 4}, "tied"),
    "hsdp": Row({"dp_replicate": 2, "dp_shard": 2}, "tied"),
    "cp2.tp2": Row({"cp": 2, "tp": 2}, "tied"),
    "dp2.tp2": Row({"dp_shard": 2, "tp": 2}, "tied"),
    "tp2.pp2": Row({"tp": 2, "pp": 2}, "tied"),
}
MOE = {
    "moe one": Row({}, "MoE"),
    "moe dp2.ep2": Row({"dp_shard": 2, "ep": 2}, "MoE"),
    "moe pp2.tp2.ep2": Row({"pp": 2, "tp": 2, "ep": 2}, "MoE"),
    "moe dp2.tp2.etp2": Row({"dp_shard": 2, "tp": 2, "etp": 2}, "MoE"),
}
MTP = {"mtp one": Row({}, "MTP 2, tied"), "mtp pp2 v": Row({"pp": 2}, "MTP 2, tied", V)}
ROWS = DENSE | MOE | MTP
HUBS = {"dp2.tp2": DENSE, "moe dp2.ep2": MOE, "mtp one": MTP}
PAIRS = [pair for hub, rows in HUBS.items() for name in rows if name != hub for pair in ((hub, name), (name, hub))]


def in_worlds(function: str, cases: dict[str, tuple[Row, object]], tmp_path_factory) -> dict:
    """`checkpoint_world:function` for cases (row, rest), a world of processes for each number of ranks."""
    worlds: dict[int, dict] = {}
    for name, (row, given) in cases.items():
        worlds.setdefault(row.shape.world, {})[name] = given
    results = {}
    for ranks, given in sorted(worlds.items()):
        results |= run_world(
            f"checkpoint_world:{function}", ranks, args={"cases": given}, folder=tmp_path_factory.mktemp(f"{function}-{ranks}")
        )
    return results


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp("run") for name in ROWS}


@pytest.fixture(scope="session")
def saved(folders, tmp_path_factory):
    return in_worlds("save", {name: (row, (str(folders[name]), row)) for name, row in ROWS.items()}, tmp_path_factory)


@pytest.fixture(scope="session")
def loaded(folders, saved, tmp_path_factory):
    cases = {f"{source} -> {target}": (ROWS[target], (str(folders[source]), ROWS[target])) for source, target in PAIRS}
    return in_worlds("load", cases, tmp_path_factory)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_mesh_goes_on_from_every_other(saved, loaded, source, target):
    before, after = saved[source], loaded[f"{source} -> {target}"]
    read = before["samples"][:BEFORE] + after["samples"]
    assert [sample for step in read for sample in step] == list(range(8 * (BEFORE + AFTER))), "each sample is read once, in its step"
    assert after["samples"] == before["samples"][BEFORE:] and after["step"] == BEFORE
    assert before["state"].keys() == after["state"].keys()
    for name, value in before["state"].items():
        assert np.array_equal(after["state"][name], value), name
    assert any(np.abs(value).max() > 0 for name, value in before["state"].items() if name.endswith("exp_avg_sq"))
    assert len(after["losses"]) == AFTER
    assert after["losses"] == pytest.approx(before["losses"], rel=1e-10)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_written_twice_and_nothing_is_missing(folders, saved, name):
    path = folders[name] / "checkpoints" / f"step-{BEFORE:08d}"
    stored, state = read_metadata(path), saved[name]["state"]
    pieces = [(index.fqn, tuple(index.offset or ())) for index in stored.storage_data]
    assert len(pieces) == len(set(pieces))
    assert {fqn for fqn, _ in pieces} == state.keys(), "copies of a tied embedding have no name of their own"
    elements = {fqn: sum(math.prod(chunk.sizes) for chunk in entry.chunks) for fqn, entry in stored.state_dict_metadata.items()}
    assert elements == {fqn: value.size for fqn, value in state.items()}
    handed_over = {fqn: sum(rank.get(fqn, 0) for rank in saved[name]["written"]) for fqn in state}
    assert handed_over == elements, "each element is copied for writing by one rank"
    size = sum(file.stat().st_size for file in path.glob("*.distcp"))
    needed = 8 * sum(elements.values())
    assert needed < size < needed + 3000 * len(pieces), "torch.save adds 1 to 2 KB to a piece"


@pytest.mark.parametrize("name", ROWS)
def test_ranks_write_only_what_their_stages_hold_and_all_of_them_write(folders, saved, name):
    stored = read_metadata(folders[name] / "checkpoints" / f"step-{BEFORE:08d}")
    written: dict[int, set[str]] = {}
    for index, place in stored.storage_data.items():
        written.setdefault(int(place.relative_path.split("_")[2]), set()).add(index.fqn)
    names = saved[name]["names"]
    assert sorted(written) == list(range(ROWS[name].shape.world))
    for rank, own in written.items():
        assert own <= set(names[rank])
    if ROWS[name].shape.pp > 1:
        weights = [{fqn for fqn in held if fqn != "step"} for held in names]
        assert not weights[0] & weights[-1]


def test_weights_to_export_are_all_on_rank_0_whatever_the_mesh(tmp_path_factory):
    rows = {"one": ROWS["one"], "tp2.pp2": ROWS["tp2.pp2"], "pp2 v": ROWS["pp2 v"], "dp2.tp2": ROWS["dp2.tp2"]}
    found = in_worlds("exported", {name: (row, row) for name, row in rows.items()}, tmp_path_factory)
    one = found.pop("one")
    assert "head.weight" not in one and len(one) > 20
    for name, weights in found.items():
        assert weights.keys() == one.keys(), name
        for key, value in one.items():
            assert np.linalg.norm(weights[key] - value) <= 1e-12 * np.linalg.norm(value), (name, key)


def test_pretrained_weights_reach_every_stage(tmp_path):
    """A tied Llama by transformers, and an untied one converted to a run folder."""
    pytest.importorskip("transformers", reason="the models are made by transformers")
    from hf_models import make, save

    from llmtrain.tools.convert import main as convert

    save(make("llama", {"tie_word_embeddings": True}), tmp_path / "tied")
    save(make("llama", {}), tmp_path / "hf")
    assert convert([str(tmp_path / "hf"), str(tmp_path / "native"), "--to", "native"]) == 0
    found = {}
    for ranks, parallel in ((1, {}), (4, {"tp": 2, "pp": 2})):
        scenarios = {name: {"pretrained": str(tmp_path / name), "parallel": parallel} for name in ("tied", "native")}
        (folder := tmp_path / f"world-{ranks}").mkdir()
        found[ranks] = run_world("pretrained_world:load_all", ranks, args={"scenarios": scenarios}, folder=folder)
    for name in ("tied", "native"):
        one, many = found[1][name], found[4][name]
        np.testing.assert_allclose(many["logits"], one["logits"], atol=1e-5)
        assert np.abs(one["logits"]).max() > 0.1
        assert many["state"].keys() < one["state"].keys(), "rank 0 has the first stage"
        for key, value in many["state"].items():
            assert np.array_equal(value, one["state"][key]), key
