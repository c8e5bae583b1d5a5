"""A plugin whose swiglu forgets the sigmoid's half of its gradient: right forward, wrong backward."""

import torch.nn.functional as F

from llmtrain.ops import register


@register("swiglu", "broken", speed=100)
def swiglu(gate, up):
    return F.silu(gate.detach()) * up + gate * (gate.detach().sigmoid() * up.detach()) - (gate * (gate.sigmoid() * up).detach()).detach()
