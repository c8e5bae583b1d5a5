"""examples/pangu_ultra_moe: its measures can reach both ends of their scales, and short runs of its arms come out as tables."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from llmtrain.data.token_file import TokenWriter
from llmtrain.model.router import Router
from llmtrain.tools.history import read_config
from llmtrain.tools.open_model import open_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/pangu_ultra_moe"
DOMAINS, IDS = ("plays", "python", "arithmetic"), 20
ARMS = ("ep_group", "bias", "drop_1.0")
SMALL = {
    "model.layers": 2,
    "model.hidden": 32,
    "model.attention": "{kind: mla, heads: 2, query_rank: 16, kv_rank: 8, nope_dim: 8, rope_dim: 4, value_dim: 8}",
    "model.ffn.hidden": 16,
    "model.ffn.dense_hidden": 32,
    "model.vocab_size": IDS * len(DOMAINS),
    "tokenizer.path": "null",
    "train.steps": 6,
    "train.seq_len": 16,
    "train.validate_samples": 8,
    "train.deterministic": "true",
    "schedule.warmup_steps": 0,
    "checkpoint.every": 0,
}


@pytest.fixture(scope="module")
def example():
    """The modules of the example by name."""
    sys.path.insert(0, str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("pangu_ultra_moe_run", EXAMPLE / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    import domains
    import routes
    import tables

    yield {"run": run, "domains": domains, "routes": routes, "tables": tables}
    sys.path[:] = [entry for entry in sys.path if entry != str(EXAMPLE)]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> tuple[str, ...]:
    """Options that make the runs small, on three domains that share no token."""
    folder, draw = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    for number, name in enumerate(DOMAINS):
        with TokenWriter(folder / name, np.uint16, sync=False) as writer:
            for _ in range(40):
                writer.add(number * IDS + draw.integers(0, IDS, 60))
    sources = json.dumps([{"path": str(folder / name), "name": name} for name in DOMAINS])
    return tuple(
        word for key, value in (SMALL | {"data.train": sources, "data.validation": sources}).items() for word in (f"--{key}", str(value))
    )


@pytest.fixture(scope="module")
def trained(example, words, tmp_path_factory) -> Path:
    """One seed of three arms."""
    output = tmp_path_factory.mktemp("runs")
    assert [example["run"].train((arm, 1, str(output), words)) for arm in ARMS] == [f"{arm}-seed1: exit code 0" for arm in ARMS]
    return output


def pairs_of(ids: np.ndarray, experts: int) -> np.ndarray:
    picked = np.zeros((len(ids), experts))
    np.put_along_axis(picked, ids, 1, 1)
    pairs = picked.T @ picked
    np.fill_diagonal(pairs, 0)
    return pairs


def test_specialisation_reaches_both_ends(example):
    alone, alike = np.eye(3, 6)[:, None] * 7, np.ones((3, 1, 6))
    assert example["routes"].specialisation(alone) == pytest.approx([1.0])
    assert example["routes"].specialisation(alike) == pytest.approx([0.0])
    assert example["routes"].specialisation(alone + alone[:, :, ::-1]) == pytest.approx([1.0])  # two experts a domain, none shared
    half = np.concatenate([np.eye(3), np.ones((3, 1))], 1)[:, None]  # every second choice goes to an expert of all domains
    assert example["routes"].specialisation(half) == pytest.approx([0.5])


def test_co_activation_is_seen_and_unequal_loads_are_none(example):
    departure, draw = example["routes"].departure, np.random.default_rng(0)
    for scores in (np.zeros(16), np.r_[50.0, np.zeros(15)], np.linspace(-2, 2, 16)):
        ids = np.argsort(-(scores + draw.gumbel(size=(20_000, 16))), 1)[:, :4]
        assert departure(pairs_of(ids, 16)) < 0.03
    fours = np.arange(400)[:, None] % 4 * 4 + np.arange(4)  # experts 0 to 3 together, 4 to 7, ...
    assert departure(pairs_of(fours, 16)) == pytest.approx(0.8)  # 3 of the 15 other experts would be partners anyway
    lift = example["routes"].lift(pairs_of(fours, 16))
    assert lift[0, 1] == pytest.approx(5.0) and lift[0, 4] == 0


def test_a_router_forced_to_experts_of_its_domain_is_fully_specialised(example, trained):
    routes = example["routes"]
    model = open_model(trained / "ep_group-seed1", device="cpu").model
    [router] = [layer for layer in model.modules() if isinstance(layer, Router)]
    from llmtrain.stages.pretrain import inputs

    datasets = inputs(read_config(trained / "ep_group-seed1")).validation
    counts = {"forced": [], "alike": []}
    for number, dataset in enumerate(datasets.values()):
        for kind, first in (("forced", 4 * number), ("alike", 0)):
            ids = torch.arange(first, first + 4)
            hook = router.register_forward_hook(lambda _m, _a, choice, ids=ids: choice._replace(ids=ids.expand_as(choice.ids)))
            seen, pairs = routes.count(model, iter([dataset.batch(0, 4)]))
            hook.remove()
            assert seen.sum() == 4 * 16 * 4 and pairs.sum() == 4 * 16 * 4 * 3
            counts[kind].append(seen.tolist())
    assert routes.specialisation(counts["forced"]) == pytest.approx([1.0])
    assert routes.specialisation(counts["alike"]) == pytest.approx([0.0])


def test_runs_become_tables(example, trained, tmp_path):
    titles = {arm: example["run"].ARMS[arm][0] for arm in ARMS}
    example["tables"].write_results(tmp_path, {arm: [trained / f"{arm}-seed1"] for arm in ARMS}, titles=titles)
    text = (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert text.startswith(f"# Results: {len(ARMS)} arms, 1 seed\n") and "nan" not in text.lower()
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert [len(table) - 2 for table in tables] == [3, 3, 3, 2, 16, 16]
    assert all(line.count("|") == table[0].count("|") for table in tables for line in table)
    losses, balance, _, claims, domains, _ = tables
    run = example["tables"].read(trained / "ep_group-seed1")
    row = next(line.split(" | ") for line in losses if line.startswith(f"| {titles['ep_group']} "))
    assert [float(cell.split(" ")[0]) for cell in row[1:4]] == [pytest.approx(run["losses"][name], abs=6e-4) for name in DOMAINS]
    dropped = {line.split(" | ")[0].strip("| "): line.split(" | ")[4] for line in balance[2:]}
    assert float(dropped[titles["drop_1.0"]].split(" ")[0]) > 0 and dropped[titles["ep_group"]] == "0"
    assert all(line.count("one seed: no claim") == 4 for line in claims[2:])
    shares = np.array([[float(cell) for cell in line.strip("| ").split(" | ")[1:]] for line in domains[2:]])
    assert shares.sum(0) == pytest.approx([100] * 3, abs=1)


def test_overlapping_seeds_make_no_claim(example):
    claim = example["tables"].claim
    assert claim([1.0, 3.0], [2.0, 4.0], ".1f") == "-1.0, no claim"
    assert claim([1.0, 2.0], [3.0, 4.0], ".1f") == "**-2.0**, lower in every seed"
    assert claim([5.0, 6.0], [3.0, 4.0], ".1f") == "**+2.0**, higher in every seed"


def test_a_done_run_is_left_alone(example, trained, words):
    before = (trained / "bias-seed1/metrics.jsonl").read_bytes()
    assert example["run"].train(("bias", 1, str(trained), words)) == "bias-seed1 (done before)"
    assert (trained / "bias-seed1/metrics.jsonl").read_bytes() == before


def test_a_routers_bias_is_opened_with_the_model(trained):
    folder = trained / "bias-seed1"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[5])
    bias = open_model(folder, device="cpu").model.blocks["1"].ffn.router.bias
    assert last["step"] == 6 and bias.abs().max() > 0
    assert torch.allclose(bias / 0.01, (bias / 0.01).round(), atol=1e-4)  # whole steps of the rate
    assert float(bias.norm()) == pytest.approx(last["experts"]["bias"][0], abs=0.01 * math.sqrt(16))  # before the last step's move


def test_groups_of_sequences_do_not_depend_on_the_micro_batch(example, words, tmp_path):
    found = []
    for rows in (2, 8):
        output = tmp_path / str(rows)
        given = ("--model.norm.c_attention", "0.3", "--model.norm.c_ffn", "0.4")  # `auto` measures them on one micro-batch
        options = (*words, *given, "--precision", "fp64", "--train.micro_batch", str(rows), "--train.steps", "2")
        example["run"].train(("ep_group", 1, str(output), options))
        lines = map(json.loads, (output / "ep_group-seed1/metrics.jsonl").read_text().splitlines())
        found.append([(line["loss"], line["balance_loss"]) for line in lines if line["kind"] == "train"])
    assert len(found[0]) == 2 and np.array(found[0]) == pytest.approx(np.array(found[1]), rel=1e-10)


def test_the_arithmetic_is_right(example):
    for seed in range(20):
        sheet = example["domains"].problems(Random(seed))
        steps = re.findall(r"^(?:\w+: |\w+ = )?(\d+(?: [-+*/] \d+)+) = (\d+)", sheet, re.MULTILINE)
        assert len(steps) > 8 and all(eval(left) == int(right) for left, right in steps)
