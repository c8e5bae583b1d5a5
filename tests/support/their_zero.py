"""A Hugging Face model trained by DeepSpeed itself, without llmtrain, and the same steps by the native engine from what was imported."""

import os
from pathlib import Path

import torch
from hf_models import make

from llmtrain.engine.deepspeed_build import own_folder

LR, BETAS, DECAY, CLIP, ROWS, LENGTH = 3e-3, (0.9, 0.95), 0.1, 1.0, 4, 16


def tokens(step: int) -> torch.Tensor:
    """[ROWS, LENGTH + 1] ids of a step."""
    return torch.randint(0, 97, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(family: str, changes: dict, stage: int, folder: str, steps: int, more: int) -> list[float]:
    """Train for `steps` steps under ZeRO, save, go on for `more`: the losses of these."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch.distributed as dist

    os.environ["TORCH_EXTENSIONS_DIR"] = str(own_folder(Path(deepspeed.__file__)))
    torch.set_num_threads(1)
    model = make(family, changes)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6, "allgather_bucket_size": 10**6}
    config = {"train_micro_batch_size_per_gpu": ROWS // 2, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    config["gradient_clipping"] = CLIP
    deepspeed.init_distributed(dist_backend="gloo")
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    losses = []
    for step in range(steps + more):
        if step == steps:
            engine.save_checkpoint(folder)
        mine = tokens(step).chunk(2)[dist.get_rank()]
        loss = engine(input_ids=mine, labels=mine).loss  # shifted inside
        engine.backward(loss)
        engine.step()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / 2)
    return losses[steps:]


def go_on(run: str, steps: int, more: int) -> tuple[int, list[float]]:
    """From the checkpoint of an imported run folder: the steps that it says were taken, and the losses of the next ones."""
    from llmtrain.config.run import RunConfig
    from llmtrain.config.train import CheckpointConfig
    from llmtrain.data.batch import Batch
    from llmtrain.device import select
    from llmtrain.engine.native import build
    from llmtrain.model.objective import cross_entropy
    from llmtrain.ops import Call, resolve
    from llmtrain.parallel import mesh as world
    from llmtrain.train.checkpoint import Checkpointer

    optim = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "max_grad_norm": CLIP}
    cfg = RunConfig.load(Path(run) / "config.yaml", {"optim": optim, "train.steps": 9})
    device = select("cpu")
    ops = resolve({}, Call(device="cpu", dtype=torch.float32, head_dim=8, heads=4, kv_heads=2))
    engine = build(cfg, objective=cross_entropy, mesh=world.start(cfg.parallel, device=device), device=device, ops=ops)
    engine.begin_phase(rope_base=cfg.model.position.base)
    checkpointer, state = Checkpointer(Path(run), CheckpointConfig(), writable=False), engine.state()
    checkpointer.load(checkpointer.find("auto"), state)
    engine.load_state(state)
    taken, losses = engine.steps_taken, []
    for step in range(steps, steps + more):
        ids = tokens(step)[:, : LENGTH + 1]
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        batch = Batch(tokens=ids[:, :-1], targets=ids[:, 1:], positions=positions, documents=None, samples=tuple(range(ROWS)))
        losses.append(engine.forward_backward([batch]).loss)
        engine.apply(lr=LR)
    return taken, losses
