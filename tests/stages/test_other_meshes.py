"""`llmtrain train` twice with other --parallel options: the run goes on at its sample, with the losses of the run that was not moved."""

import os
import shutil

import numpy as np
import pytest

WORDS = ("--precision", "fp64", "--train.steps", "12", "--checkpoint.every", "4", "--checkpoint.export", "hf")
MESHES = {
    "tp2.pp2": ("--parallel.tp", "2", "--parallel.pp", "2", "--parallel.dp_shard", "1"),
    "cp2": ("--parallel.cp", "2", "--parallel.cp_kind", "ring", "--parallel.dp_shard", "1"),
}


@pytest.fixture(scope="module")
def stayed(lab):
    """The run that was never moved."""
    return lab.train("stayed", *WORDS, "--parallel.dp_shard", "2")


@pytest.fixture(scope="module")
def moved(lab, stayed):
    """Its first 4 steps, then tp2.pp2 up to step 8, then cp2 to the end."""
    path = lab.copy(stayed, "moved", newest=4)
    shutil.rmtree(path / "hf")
    first = lab.train("moved", *WORDS, *MESHES["tp2.pp2"])
    weights = exported(first.path)
    shutil.rmtree(path / "checkpoints" / "step-00000012")
    return first, weights, lab.train("moved", *WORDS, *MESHES["cp2"])


def exported(path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path / "hf" / "model.safetensors")


def test_a_run_goes_on_at_its_sample_on_another_mesh(stayed, moved):
    first, _, second = moved
    assert "mesh: pp 2 x tp 2 " in first.out and "mesh: cp 2 " in second.out
    assert first.resumed() == 4 and "next sample 32 " in first.out
    assert second.resumed() == 8 and "next sample 64 " in second.out
    assert os.path.realpath(second.path / "latest").endswith("step-00000012")
    for run in (first, second):
        assert run.values("samples", "tokens", "lr", "targets") == stayed.values("samples", "tokens", "lr", "targets")
        assert run.values().keys() == set(range(1, 13))


def test_its_losses_are_those_of_the_run_that_stayed(stayed, moved):
    second = moved[2]
    assert second.losses() == pytest.approx(stayed.losses(), rel=1e-10)
    assert second.losses()[:4] == stayed.losses()[:4]
    norms = [[norm for _, norm in run.values().values()] for run in (stayed, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-9)


def test_what_it_exports_is_the_same(stayed, moved):
    _, weights, second = moved
    one = exported(stayed.path)
    for other in (weights, exported(second.path)):
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert np.linalg.norm(other[name] - value) <= 1e-10 * np.linalg.norm(value), name
