"""Parameters in global terms: which part of a logical tensor this rank holds, over all the ranks that share it."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from llmtrain.compat import dtensor_as_is
from llmtrain.parallel.mesh import Mesh


def canonical(parameter: Tensor, local: Tensor, mesh: Mesh) -> Tensor:
    """`local`, which stands where this rank's part of `parameter` does, as a DTensor over every rank that holds some part of it.

    Axes that the parameter's own mesh leaves out hold equal copies. On one rank `local` itself. Shares memory; makes no communication.
    """
    if mesh.world == 1:
        return local
    own = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    over = mesh.experts_of_a_stage if {"ep", "etp", "efsdp"} & set(own) else mesh.dense
    placements = [parameter.placements[own.index(axis)] if axis in own else Replicate() for axis in over.mesh_dim_names]
    if local.device.type != over.device_type:  # moments on the host, which from_local would copy to the device
        return dtensor_as_is(local, over, placements, shape=parameter.shape, stride=parameter.stride())
    return DTensor.from_local(local, over, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
