"""One rank of the job: reads a JSON request per line, answers with a JSON line. Started by bench/wire/ranks.py."""

import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from exchanges import Exchanges
from job import KINDS, TOP_K, Arm, Size, values
from train_peers.answering import answer_requests

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.device import select
from llmtrain.engine.native import build
from llmtrain.model.cache import KVCache
from llmtrain.model.objective import cross_entropy
from llmtrain.ops import Mask, resolve
from llmtrain.parallel import mesh as world
from llmtrain.stages.session import op_call

COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


class Worker:
    """An engine per arm, all on one mesh."""

    def __init__(self):
        torch.set_num_threads(1)
        self.engines, self.size, self.mesh = {}, None, None

    def build(self, *, size: list) -> dict:
        """Join the world and build every arm's engine; returns the parameters of each."""
        self.size = Size(*size)
        device, ranks = select("cpu"), int(os.environ["WORLD_SIZE"])
        configs = {arm: RunConfig.model_validate(values(arm, self.size, ranks=ranks)) for arm in (Arm(k, n) for k in KINDS for n in TOP_K)}
        self.mesh = world.start(next(iter(configs.values())).parallel, device=device)
        for arm, cfg in configs.items():
            ops = resolve(cfg.kernels, op_call(cfg, device))
            self.engines[arm] = build(cfg, objective=cross_entropy, mesh=self.mesh, device=device, ops=ops)
        return {arm.name: sum(p.numel() for p in engine.parameters.values()) for arm, engine in self.engines.items()}

    def step(self, *, arm: list, record: bool = True) -> dict:
        """An optimizer step on this rank's tokens."""
        engine = self.engines[Arm(*arm)]
        batch = self._batch()

        def work() -> None:
            engine.forward_backward([batch])
            engine.apply(lr=1e-4)

        return self._measured(work, record=record)

    def generate(self, *, arm: list, rows: int, new: int) -> list[dict]:
        """Fill a cache with `rows` prompts of this rank and add `new` tokens to each, the likeliest: a measurement per token."""
        model = self.engines[Arm(*arm)].stages.parts[0]
        cache, state = KVCache(self.size.length + new), {"tokens": self._tokens(rows)}

        def work() -> None:
            logits = model(state["tokens"], mask=Mask(), cache=cache, last=1)["logits"]
            state["tokens"] = logits.argmax(-1)

        with torch.no_grad():
            return [self._measured(work, record=True) for _ in range(new)]

    def _tokens(self, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.mesh.rank)
        return torch.randint(self.size.vocabulary, (rows, self.size.length), generator=generator)

    def _batch(self) -> Batch:
        tokens = self._tokens(self.size.sequences)
        positions = torch.arange(self.size.length).expand_as(tokens)
        return Batch(tokens=tokens, targets=tokens.roll(-1, 1), positions=positions, documents=None, samples=tuple(range(len(tokens))))

    def _measured(self, work, *, record: bool) -> dict:
        """Seconds that `work` takes from a moment at which all ranks are ready, what it exchanges, and what leaves by the interface."""
        self.mesh.meet()
        before, started = counted(), time.perf_counter()
        with Exchanges() if record else nullcontext() as exchanges:
            work()
        seconds = time.perf_counter() - started
        self.mesh.meet()  # what is on its way has arrived
        return {"step": seconds, "interface": counted() - before} | (exchanges.summary() if record else {})


def counted() -> int:
    """Bytes that have left this namespace; 0 outside one."""
    return int(COUNTER.read_text()) if COUNTER.exists() else 0


if __name__ == "__main__":
    answer_requests(Worker())
    os._exit(0)  # a thread of gloo may not outlive Python's own end
