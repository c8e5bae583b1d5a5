"""Notes the process groups that torch is asked to make, in order."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d


@contextmanager
def groups_made() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """(description, global ranks) of every group made so far, whether or not this rank is in it."""
    made, new_group = [], distributed_c10d.new_group

    def noting(ranks=None, *args, **options):
        made.append((options.get("group_desc"), tuple(ranks)))
        return new_group(ranks, *args, **options)

    with ExitStack() as patches:
        for module in (dist, distributed_c10d, device_mesh):  # each may hold the function under a name of its own
            patches.enter_context(patch.object(module, "new_group", noting, create=True))
        yield made


def expected(shape) -> list[tuple[str, tuple[int, ...]]]:
    """The same by arithmetic. A group of all ranks is the world's own."""
    groups = shape.all_groups(experts=shape.ep > 1 or shape.etp > 1)
    return [(f"mesh_{group.axis}", group.ranks) for group in groups if len(group.ranks) < shape.world]
