"""How frameworks, and the engines of this package, compute what they are asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Habits:
    """How a framework computes what it is asked for: few values, the same for every run of it."""

    name: str = "llmtrain"
    fused: bool = True
    """Norms, activations, RoPE and residuals as one kernel each; else several passes (eager PyTorch)."""
    flash: bool = True
    """Attention without the score matrix in memory."""
    older_attention: bool = False
    """FlashAttention 2 rather than kernels written for the GPU's generation."""
    dropout: bool = False
    """Dropout after attention and feed-forward branch, and on the scores where they exist."""
    tp_hidden: bool = False
    """Sends of tensor parallelism go beside the products (MC2, TE userbuffers, async TP)."""
    dp_hidden: bool = True
    """Gradients are reduced beside the backward pass."""
    sends_once: bool = False
    """Dispatch sends a token to each node once, however many of its experts are there (DeepEP, HybridEP)."""
    gathers_rows: bool = False
    """Where tp shares an expert: rows are sent to their experts first and then gathered over tp; else tokens are gathered and then sent."""
    ep_hidden: bool = False
    """Dispatch and combine go beside other work."""
    half_products: bool = False
    """`selective` computes every second product again (torchtitan), not the attention's inside (Megatron)."""
    stops_early: bool = False
    """`full` leaves out the last product of a dense block (torch's checkpoint without reentrance)."""
    gradient_bytes: int = 4
    """Of a gradient as it is accumulated and sent."""
    second_gradient: int = 0
    """Bytes of a gradient in the format of the products beside the one that is accumulated (in the buckets of DDP)."""
    reduces_whole: bool = False
    """ZeRO 1 sums whole gradients (all-reduce) after the backward pass, and copies each rank's part of each tensor when it gathers."""
    bucket_bytes: float = 0.0
    """Gradients go in pieces of so many bytes, each a collective of its own; all at once if 0."""
    tensor_launches: int = 0
    """Operators of the update for each parameter, where it goes through them one by one."""
    reuses_master: bool = False
    """The 16-bit weight lies in the memory of its fp32 master (MindSpeed's reuse-fp32-param)."""
    keeps_gathered: bool = False
    """What sequence parallelism has gathered for a product stays for its backward pass."""
    copies: bool = False
    """Activations are kept by unfused operators: both factors of the gate, copies around attention, sums of the residual stream."""
    logit_bytes: int = 10
    """Bytes per logit at the peak of the loss."""
    statistics: int = 4
    """Bytes per query and head that attention without a score matrix keeps of the softmax."""
    pads_values: bool = False
    """Latent attention's values are padded to the width of its keys, which its kernel wants alike."""
    moment_bytes: int | None = None
    """Of each of the optimizer's moments, if not as wide as the master weights."""
    first_step: bool = False
    """Peak memory is read after the first step, in which the moments are made after the backward pass: they and activations never meet."""
    reserved: bool = False
    """Peak memory is what the allocator has reserved, not what tensors take."""
    even_layers: bool = False
    """Every pipeline stage has as many blocks, whatever embedding and head cost."""
    weight_bytes: int = 2
    """Of a parameter beside its fp32 master; 0 where there is the master alone (FSDP)."""
    tp_ranks_share_input: bool = True
    """Sequence parallelism: what lies between the branches is split over tp too."""
    reduces_once: bool = False
    """Gradients of several micro-batches are added up whole and reduced after the last."""
    reduces_each: bool = False
    """Where ranks share gradients (ZeRO 2 and 3) they are reduced after every micro-batch."""
    chunked_loss: bool = False
    """The logits of a few tokens exist at once, not those of the micro-batch."""
