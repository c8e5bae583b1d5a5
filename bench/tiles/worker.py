"""One rank: an attention branch and a model of which it holds its part. Started by bench/wire/ranks.py."""

import os
import time

import torch
import torch.distributed as dist
from llmtrain_kernels import Mask
from llmtrain_kernels.tiled_reduce import attention_project_reduce
from train_peers.answering import answer_requests

from llmtrain.config.model import ModelConfig
from llmtrain.config.train import ParallelConfig
from llmtrain.device import select
from llmtrain.model import initialise
from llmtrain.model.decode import CachedRunner
from llmtrain.ops import Call, choose
from llmtrain.parallel import mesh as world
from llmtrain.tools.open_model import empty_model
from tiles.job import Branch, Prompt


class Done:
    """The handle of a sum that nobody makes."""

    def wait(self) -> None:
        """Nothing is under way."""


class Worker:
    """What is measured, on this rank."""

    def __init__(self):
        torch.set_num_threads(1)
        self.ranks = int(os.environ["WORLD_SIZE"])
        self.mesh = world.start(ParallelConfig(tp=self.ranks), device=select("cpu"))

    @torch.inference_mode()
    def build(self, *, branch: list, prompt: list) -> dict:
        """Draw the inputs of the branch and the weights of the model; returns which attention serves."""
        self.branch, self.prompt = Branch(*branch), Prompt(*prompt)
        tokens, hidden, heads, kv_heads = self.branch
        width = hidden // heads
        call = Call(device="cpu", dtype=torch.float32, backward=False, head_dim=width, heads=heads, kv_heads=kv_heads, offsets=True)
        self.attention = choose("attention", call)
        draw = torch.Generator().manual_seed(self.mesh.rank)
        shapes = [(1, count // self.ranks, tokens, width) for count in (heads, kv_heads, kv_heads)]
        self.qkv = [torch.randn(shape, generator=draw) for shape in shapes]
        self.weight = torch.randn(hidden, hidden // self.ranks, generator=draw)
        cfg = ModelConfig.model_validate(self.prompt.model())
        self.model = empty_model(cfg, self.mesh.device, torch.float32, self.mesh)
        initialise(self.model.part, cfg, 1)
        return {"attention": self.attention.name}

    @torch.inference_mode()
    def attend(self, *, count: int, send: bool) -> dict:
        """The branch in `count` tiles, with its sums or without."""
        reduce = self._start_sum if send else lambda part: Done()
        given = {"attention": self.attention.function, "reduce": reduce, "count": count, "mask": Mask()}
        return self._timed(lambda: attention_project_reduce(*self.qkv, self.weight, **given))

    @torch.inference_mode()
    def send(self, *, count: int) -> dict:
        """The sums of `count` tiles with nothing to compute."""
        parts = torch.zeros(self.branch.tokens, self.branch.hidden).tensor_split(count)

        def work() -> None:
            for handle in [self._start_sum(part) for part in parts]:
                handle.wait()

        return self._timed(work)

    def answer(self, *, count: int) -> dict:
        """The pass over a prompt of the model in `count` tiles."""
        self.model.set_tp_chunks(count)
        runner = CachedRunner(self.model, slots=1, capacity=self.prompt.tokens)
        return self._timed(lambda: runner.begin([[n % 1021 for n in range(self.prompt.tokens)]]))

    def _start_sum(self, part: torch.Tensor) -> dist.Work:
        return dist.all_reduce(part, group=self.mesh.group("tp"), async_op=True)

    def _timed(self, work) -> dict:
        """Seconds that `work` takes from a moment at which all ranks are ready."""
        self.mesh.meet()
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        self.mesh.meet()
        return {"seconds": seconds}


if __name__ == "__main__":
    answer_requests(Worker())
    os._exit(0)  # a thread of gloo may not outlive Python's own end
