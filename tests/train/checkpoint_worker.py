"""One rank of the checkpoint tests: python checkpoint_worker.py CASE FOLDER, with RANK and WORLD_SIZE set."""

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmtrain.config.train import CheckpointConfig
from llmtrain.train import checkpoint_files, checkpoint_state
from llmtrain.train.checkpoint import Checkpointer, CheckpointError

SHAPES = {"up": (5, 3), "down": (3, 5), "tall": (7, 2), "one": (1, 4)}
"""Uneven on purpose: 5 rows over 4 ranks are 2, 2, 1 and 0 rows."""


def whole(fill: float = 0.0) -> dict[str, torch.Tensor]:
    """The state as one process has it; every element differs, in fp32, fp64 and bf16."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, shape in SHAPES.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)
        state[f"{name}.exp_avg"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    state["norm.weight"] = torch.randn(6, generator=generator).bfloat16()
    state["step"] = torch.tensor(7 + fill)
    return {name: tensor + fill for name, tensor in state.items()}


def sharded(fill: float, mesh) -> dict[str, torch.Tensor]:
    """The same state with weights and moments as FSDP2 shards them over `mesh`, the rest plain."""
    full = whole(fill)
    model = nn.ModuleDict({name: nn.Linear(shape[1], shape[0], bias=False) for name, shape in SHAPES.items()})
    for layer in model.values():
        fully_shard(layer, mesh=mesh)
    state = {}
    for name, parameter in model.named_parameters():
        rows = parameter.detach()
        for kind in ("weight", "exp_avg"):
            source = full[f"{name.removesuffix('.weight')}.{kind}"]
            local = slice_like(source, rows)
            state[f"{name.removesuffix('.weight')}.{kind}"] = DTensor.from_local(
                local, rows.device_mesh, rows.placements, run_check=False, shape=source.shape, stride=source.stride()
            )
    return state | {name: full[name] for name in ("norm.weight", "step")}


def slice_like(source: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's rows of `source`, sharded as `like` is (dim 0, the last mesh axis)."""
    parts = source.chunk(like.device_mesh.size(-1))
    index = like.device_mesh.get_coordinate()[-1]
    return parts[index].clone() if index < len(parts) else source[:0].clone()


def require_equal(state: dict[str, torch.Tensor], fill: float) -> None:
    """Bit for bit what `sharded(fill)` or `whole(fill)` holds."""
    for name, expected in whole(fill).items():
        tensor = state[name]
        expected = slice_like(expected, tensor) if isinstance(tensor, DTensor) else expected
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert local.dtype == expected.dtype and torch.equal(local, expected), (name, local, expected)


def save_sharded(folder: Path) -> None:
    """Two ranks: save, fail on rank 1 only, save again, share the search for damage."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=5), timeout=60)
    for step in (1, 2):
        state = sharded(step, mesh)
        checkpointer.save(step, state, {"step": step})
        for tensor in state.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
    checkpointer.wait()
    assert checkpointer.failed is None, checkpointer.failed
    fail_on_rank_1(checkpointer, mesh)
    checkpointer.save(4, sharded(4, mesh), {"step": 4})
    checkpointer.wait()
    assert checkpointer.failed is None
    assert checkpointer.newest().name == "step-00000004"
    if rank == 0:
        flip(next((folder / "checkpoints" / "step-00000004").glob("__1_*")))
    dist.barrier()
    assert checkpointer.newest().name == "step-00000002"
    refuse_what_fits_on_one_rank_only(checkpointer, mesh)


def fail_on_rank_1(checkpointer: Checkpointer, mesh) -> None:
    real = checkpoint_files.file_entry
    if dist.get_rank() == 1:
        checkpoint_files.file_entry = full_disk
    checkpointer.save(3, sharded(3, mesh), {"step": 3})
    checkpointer.wait()
    checkpoint_files.file_entry = real
    assert "No space left" in checkpointer.failed and "rank 1" in checkpointer.failed, checkpointer.failed
    dist.barrier()
    assert [p.name for p in sorted(checkpointer.checkpoints.iterdir())] == ["step-00000001", "step-00000002"]


def full_disk(path: Path) -> dict:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def refuse_what_fits_on_one_rank_only(checkpointer: Checkpointer, mesh) -> None:
    state = sharded(0, mesh)
    if dist.get_rank() == 1:
        state["strange"] = torch.zeros(1)
    try:
        checkpointer.load(checkpointer.newest(), state)
    except CheckpointError as error:
        assert "strange" in str(error) and "rank 1" in str(error)  # on both ranks, neither left waiting
    else:
        raise AssertionError("a checkpoint that does not fit was loaded")


def load_sharded(folder: Path) -> None:
    """Four ranks: load what two saved, then save as HSDP 2 x 2."""
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=5), timeout=60)
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    path = checkpointer.newest()
    for mesh in (line, square):
        state = sharded(-5, mesh)
        assert checkpointer.load(path, state) == {"step": 2}
        require_equal(state, 2)
    checkpointer.save(8, sharded(8, square), {"step": 8})
    checkpointer.wait()
    assert checkpointer.failed is None, checkpointer.failed
    own = checkpoint_state.own_part(sharded(8, square), rank=dist.get_rank(), world=4)
    counts = [None] * 4
    dist.all_gather_object(counts, sorted(own))
    assert sum(map(len, counts)) == 2 * 2 * len(SHAPES) + 2, counts  # each of two shards once, each plain tensor once


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * where), len(data) - 1)] ^= 1
    path.write_bytes(data)


def killed(folder: Path) -> None:
    """One process that forks savers and kills each at a random moment; what is found afterwards must be whole."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 100_000))
    print("seed", seed, flush=True)
    dice = random.Random(seed)
    middle = 0
    cfg = CheckpointConfig(keep_last=1, asynchronous=True)
    for _ in range(int(os.environ.get("KILLS", 25))):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(folder, cfg, write_end)
        os.close(write_end)
        assert os.read(read_end, 4)  # it has begun
        time.sleep(dice.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read_end, "rb") as pipe:
            begun = int.from_bytes((b"\0" * 4 + pipe.read())[-4:], "big")
        middle += any(p.suffix for p in (folder / "checkpoints").iterdir())
        step = check_after_kill(folder, cfg)
        assert step >= begun - 1, f"save {begun} was begun, so {begun - 1} was complete, but {step} was found"
    print("ok, killed inside a save:", middle)


def save_for_ever(folder: Path, cfg: CheckpointConfig, report: int) -> None:
    checkpointer = Checkpointer(folder, cfg, log=lambda text: None)
    path = checkpointer.newest()
    step = int(path.name.removeprefix("step-")) if path else 0
    os.write(report, (0).to_bytes(4, "big"))
    while True:
        step += 1
        repeat = step % 3 == 0  # also replace a checkpoint by one of the same step
        for _ in range(1 + repeat):
            checkpointer.save(step, {"a": torch.full((2000,), step), "b": torch.full((3,), float(step))}, {"step": step})
        os.write(report, step.to_bytes(4, "big"))


def check_after_kill(folder: Path, cfg: CheckpointConfig) -> int:
    """The step of the newest checkpoint after cleaning up; 0 if there is none yet."""
    said = []
    checkpointer = Checkpointer(folder, cfg, log=said.append)
    path = checkpointer.newest()
    assert not [text for text in said if "damaged" in text], said
    assert not [p for p in checkpointer.checkpoints.iterdir() if p.suffix]
    if path is None:
        return 0
    state = {"a": torch.zeros(2000, dtype=torch.int64), "b": torch.zeros(3)}
    step = checkpointer.load(path, state)["step"]
    assert path.name == f"step-{step:08d}" and bool((state["a"] == step).all()) and bool((state["b"] == step).all())
    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    case, where = sys.argv[1], Path(sys.argv[2])
    if "RANK" in os.environ:
        store = dist.FileStore(str(where / f"store-{case}"), int(os.environ["WORLD_SIZE"]))
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    {"save_sharded": save_sharded, "load_sharded": load_sharded, "killed": killed}[case](where)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
