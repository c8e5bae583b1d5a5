"""Universal checkpoints of DeepSpeed become run folders with weights, moments and their steps; written by hand here, by DeepSpeed in
tests/engines/test_deepspeed_import.py."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import make, save

from llmtrain.cli import main
from llmtrain.config.train import CheckpointConfig
from llmtrain.convert.import_hf import model_config, read_weights
from llmtrain.train import checkpoint_state
from llmtrain.train.checkpoint import Checkpointer

pytest.importorskip("transformers", reason="it makes the models")
FILES = {"weight": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def universal(folder: Path, family: str, changes: dict, *, steps: int = 7) -> dict[str, Path]:
    """A universal checkpoint of a random model beside its config.json; a Hugging Face folder of each kind of tensor, for comparison."""
    kinds = {}
    for seed, (kind, file) in enumerate(FILES.items()):
        model = make(family, changes, seed=seed)
        kinds[kind] = save(model, folder / "as" / kind)
        for name, tensor in model.named_parameters():
            place = folder / "global_step7_universal" / "zero" / name
            place.mkdir(parents=True, exist_ok=True)
            torch.save({"param": tensor.detach().clone()}, place / f"{file}.pt")
            torch.save(steps, place / "step.pt")
    (folder / "config.json").write_text((kinds["weight"] / "config.json").read_text())
    return kinds


def stored(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """All tensors of a run folder's checkpoint, and its meta."""
    path = Checkpointer(run, CheckpointConfig(), writable=False).find("auto")
    metadata = checkpoint_state.read_metadata(path)
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.state_dict_metadata.items()}
    checkpoint_state.read(path, state, metadata)
    return state, json.loads((path / "meta.json").read_text())


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3_moe", {})])
def test_weights_and_moments_go_through_the_same_map(family, changes, tmp_path):
    kinds = universal(tmp_path, family, changes)
    assert main(["convert", str(tmp_path / "global_step7_universal"), str(tmp_path / "run"), "--to", "native"]) == 0
    state, meta = stored(tmp_path / "run")
    cfg = model_config(kinds["weight"])
    expected = {f"{name}.{kind}": tensor for kind, folder in kinds.items() for name, tensor in read_weights(folder, cfg)}
    assert state.keys() == {*expected, "step"} and state["step"] == 7
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert meta["step"] == 0 and "weights_only" not in meta


def test_flat_tensors_of_zero_3_get_their_shapes_and_steps_from_the_model_states(tmp_path, capsys):
    universal(tmp_path, "llama", {})
    folder, shapes = tmp_path / "global_step7_universal", {}
    for file in (folder / "zero").glob("*/*.pt"):
        if file.name == "step.pt":
            file.unlink()
            continue
        tensor = torch.load(file)["param"]
        shapes[file.parent.name] = tensor.shape
        torch.save(torch.nn.functional.pad(tensor.flatten(), (0, 1)), file)
    words = ["convert", str(folder), str(tmp_path / "run"), "--to", "native"]
    assert main(words) == 1 and "is flat, and no *_model_states.pt says its shape" in capsys.readouterr().err
    states = {"param_shapes": [shapes], "global_steps": 9, "skipped_steps": 2}
    torch.save(states, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert main(words) == 0
    state, _ = stored(tmp_path / "run")
    expected = dict(read_weights(tmp_path / "as/exp_avg_sq", model_config(tmp_path)))
    assert state["step"] == 7 and all(torch.equal(state[f"{name}.exp_avg_sq"], tensor) for name, tensor in expected.items())


def test_deepspeeds_own_checkpoint_is_refused_with_the_command_that_makes_it_universal(tmp_path, capsys):
    own = tmp_path / "global_step7"
    own.mkdir()
    (own / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert main(["convert", str(own), str(tmp_path / "run"), "--to", "native"]) == 1
    said = capsys.readouterr().err
    assert f"python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {own}" in said


def test_what_is_wrong_is_named(tmp_path, capsys):
    universal(tmp_path, "llama", {})
    folder = tmp_path / "global_step7_universal"
    norm = folder / "zero" / "model.norm.weight"

    def said() -> str:
        assert main(["convert", str(folder), str(tmp_path / "run"), "--to", "native"]) == 1
        return capsys.readouterr().err

    torch.save(8, norm / "step.pt")
    assert "parameters have taken different numbers of steps, [7, 8]" in said()
    torch.save(7, norm / "step.pt")
    torch.save({"param": Path("x")}, norm / "fp32.pt")
    assert f"{norm / 'fp32.pt'} cannot be read as plain tensors" in said(), "a pickle may run any code"
    torch.save({"param": torch.zeros(5)}, norm / "fp32.pt")
    assert "model.norm.weight has shape [5], config.json makes it [32]" in said()
    (norm / "fp32.pt").unlink()
    assert "missing: model.norm.weight" in said()
    (tmp_path / "config.json").unlink()
    assert "the model's config.json is neither there nor in" in said()
    assert not (tmp_path / "run").exists()
