"""The pipeline stages of a rank under megatron-core, and how micro-batches go through them by its schedules.

Imports megatron-core, so it is imported when an engine is built.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import NO_TARGET
from llmtrain.engine.megatron_model import build_stages, transformer_config
from llmtrain.engine.megatron_shared import Shared
from llmtrain.engine.micro_batch import MicroBatch
from llmtrain.errors import UserError
from llmtrain.layout.pipeline import PipelinePlan
from llmtrain.parallel.mesh import Mesh


def start_world(cfg: RunConfig, mesh: Mesh) -> None:
    """megatron-core's groups over the ranks of `mesh`, which stand as its order `tp-cp-ep-dp-pp` has them."""
    shape = mesh.shape
    if mpu.is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=shape.tp,
        pipeline_model_parallel_size=shape.pp,
        virtual_pipeline_model_parallel_size=cfg.parallel.virtual_stages if shape.pp > 1 and cfg.parallel.virtual_stages > 1 else None,
        context_parallel_size=shape.cp,
        expert_model_parallel_size=shape.ep,
        expert_tensor_parallel_size=shape.etp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(cfg.seed)


class MegatronStages:
    """Models by stage number, each wrapped by megatron-core's data parallelism."""

    def __init__(self, cfg: RunConfig, shared: Shared, mesh: Mesh, *, sharded: bool):
        self.cfg, self.shared, self.mesh = cfg, shared, mesh
        self.plan = PipelinePlan.from_config(cfg) if mesh.shape.pp > 1 else None
        self.config = transformer_config(cfg, mesh.shape, self.plan, device=mesh.device.kind)
        self.models = build_stages(cfg, self.config, shared, shape=mesh.shape, plan=self.plan, place=mesh.place("pp"))
        self.sharded = sharded
        self.wrapped: list[nn.Module] = []
        self.vocab = cfg.model.vocab_size

    def wrap(self) -> None:
        """Give the gradients their buffers; parameters get their last place in memory."""
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=self.sharded)
        for model in self.models.values():
            inside = Float16Module(self.config, model) if self.config.bf16 else model
            self.wrapped.append(DistributedDataParallel(self.config, options, inside))
        self.config.finalize_model_grads_func = lambda models, tokens, **groups: finalize_model_grads(models, None, **groups)

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return (0 if self.plan is None else self.plan.stages - 1) in self.models

    def train(self, micros: Sequence[MicroBatch], *, objective: Callable[[dict], Tensor], scale: float) -> list[Tensor]:
        """Forward and backward of `objective` * scale over all micro-batches, gradients summed over ranks: the bare objectives, [] without
        the last stage."""
        if len(self.wrapped) > 1 and len(micros) < self.mesh.shape.pp:
            raise UserError(
                f"engine megatron: {len(micros)} micro-batches of a step are fewer than parallel.pp {self.mesh.shape.pp}, which "
                "parallel.virtual_stages needs; raise train.global_batch or lower train.micro_batch"
            )
        self._weigh(micros)
        for model in self.wrapped:
            model.train()
            model.zero_grad_buffer()

        def loss(index: int, logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
            value = objective(self._outputs(logits, micros[index]))
            return value * scale, torch.zeros([], dtype=torch.int, device=value.device), value.detach()

        return self._run(micros, loss, forward_only=False)

    def _weigh(self, micros: Sequence[MicroBatch]) -> None:
        """Weights of the losses of routers: megatron-core multiplies each by the tokens that this rank has of a micro-batch, and gradients
        are sums here, where ours are means over the groups, or the tokens, of the step."""
        ffn, shape = self.cfg.model.ffn, self.mesh.shape
        if ffn.kind != "moe":
            return
        rows, length = micros[0].tokens.shape
        sequences = len(micros) * rows * shape.dp
        if ffn.balance is not None:
            tokens = length // shape.tp  # of a row; in the loss over each row megatron-core takes these for all of the micro-batch
            self.config.moe_aux_loss_coeff = ffn.balance.weight * (rows if ffn.balance.sequences == 1 else 1) / (sequences * tokens)
        if ffn.router.z_loss:  # which it also divides by the ranks that share a sequence
            self.config.moe_z_loss_coeff = ffn.router.z_loss * shape.tp * shape.cp / (sequences * length * shape.cp)

    @torch.no_grad()
    def infer(self, micros: Sequence[MicroBatch], *, output: str) -> list[Tensor]:
        """`ce_sum` or `logits` [B,S,V] of every micro-batch; [] without the last stage."""

        def result(index: int, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wanted = self._ce_sum(logits, micros[index].targets) if output == "ce_sum" else self._whole(logits)
            return logits.sum(), torch.zeros([], dtype=torch.int, device=logits.device), wanted

        for model in self.wrapped:
            model.eval()
        found = []
        for index, micro in enumerate(micros):  # one by one, since the last ones of a validation may be shorter
            again = self.mesh.shape.pp if len(self.wrapped) > 1 else 1  # virtual stages want as many as there are ranks
            found += self._run([micro] * again, lambda at, logits, index=index: result(index, logits), forward_only=True)[:1]
        return found

    def _run(self, micros: Sequence[MicroBatch], loss: Callable, *, forward_only: bool) -> list[Tensor]:
        self.shared.micros = list(micros)

        def step(numbers, model: nn.Module) -> tuple[Tensor, Callable]:
            index = next(numbers)
            micro = micros[index]
            logits = model(micro.tokens, micro.positions, self.shared.number(index))
            return logits, lambda output: loss(index, output)

        rows, length = micros[0].tokens.shape
        numbers = [iter(range(len(micros))) for _ in self.wrapped]
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=numbers,
            model=self.wrapped,
            num_microbatches=len(micros),
            seq_length=length * self.mesh.shape.cp,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def _outputs(self, logits: Tensor | tuple[Tensor, ...], micro: MicroBatch) -> dict:
        """What an objective is told: as our model gives it."""
        if isinstance(logits, Tensor):
            return {"ce_sum": self._ce_sum(logits, micro.targets)}
        first, *others = logits
        sums = [self._ce_sum(part, targets) for part, (_, targets) in zip(others, micro.ahead)]
        weight = self.cfg.model.mtp.loss_weight / len(sums)
        return {"ce_sum": self._ce_sum(first, micro.targets), "mtp_ce_sum": sum(sums[1:], sums[0]), "mtp_weight": weight}

    def _ce_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits [B,S,V/t] summed over targets [B,S], in fp32; padding of the vocabulary is no choice."""
        losses = tensor_parallel.vocab_parallel_cross_entropy(self._masked(logits.float()), targets.clamp(min=0))
        return losses.where(targets != NO_TARGET, 0.0).sum()

    def _masked(self, logits: Tensor) -> Tensor:
        width = logits.shape[-1]
        first = self.vocab - width * self.mesh.place("tp")
        if first >= width:
            return logits
        return logits.masked_fill(torch.arange(width, device=logits.device) >= first, float("-inf"))

    def _whole(self, logits: Tensor) -> Tensor:
        """[B,S,V/t] -> [B,S,V]."""
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[..., : self.vocab]

    def share_logits(self, found: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The last stage's logits on every rank of the pipeline."""
        found = [logits.to(dtype) for logits in found]  # megatron-core has made them fp32
        if self.plan is None:
            return found[0]
        logits = found[0].contiguous() if found else torch.empty(shape, dtype=dtype, device=device)
        group = mpu.get_pipeline_model_parallel_group()
        dist.broadcast(logits, dist.get_process_group_ranks(group)[-1], group=group)
        return logits
