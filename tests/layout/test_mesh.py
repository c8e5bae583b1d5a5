"""Groups of the mesh by arithmetic, and as torch makes them."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist
from groups_made import expected, groups_made
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.train import ParallelConfig
from llmtrain.errors import UserError
from llmtrain.layout.mesh import AXES, EXPERT_AXES, NODE_AXES, MeshShape

SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def shapes(draw):
    dp_shard, cp, tp = draw(SIZES), draw(SIZES), draw(SIZES)
    etp = draw(st.sampled_from([1, tp]))
    sharing = dp_shard * cp * tp // etp
    ep = draw(st.sampled_from([n for n in range(1, sharing + 1) if sharing % n == 0]))
    inner = draw(st.sampled_from([n for n in range(1, ep + 1) if ep % n == 0]))
    return MeshShape(pp=draw(SIZES), dp_replicate=draw(SIZES), dp_shard=dp_shard, cp=cp, tp=tp, ep=ep, etp=etp, ep_inner=inner)


@given(shape=shapes())
@settings(max_examples=60, deadline=None)
def test_groups_of_every_axis_part_the_world(shape):
    for axis in (*AXES, "fsdp", *shape.expert_axes):
        groups = shape.groups(axis)
        assert sorted(rank for group in groups for rank in group.ranks) == list(range(shape.world))
        assert {len(group.ranks) for group in groups} == {getattr(shape, axis)}


@given(shape=shapes())
@settings(max_examples=60, deadline=None)
def test_a_rank_and_its_place_are_inverse_and_groups_differ_along_their_axis_alone(shape):
    for axes in (AXES, EXPERT_AXES, NODE_AXES):
        assert all(shape.rank(shape.place(rank, axes), axes) == rank for rank in range(shape.world))
        for axis in axes:
            for group in shape.groups(axis):
                places = [shape.place(rank, axes) for rank in group.ranks]
                assert [place[axis] for place in places] == list(range(getattr(shape, axis)))
                assert len({tuple(v for a, v in place.items() if a != axis) for place in places}) == 1


@given(shape=shapes())
@settings(max_examples=40, deadline=None)
def test_experts_stay_within_a_stage_and_a_replica(shape):
    for axis in ("efsdp", "ep", "etp"):
        for group in shape.groups(axis):
            assert len({(p["pp"], p["dp_replicate"]) for p in map(shape.place, group.ranks)}) == 1
    if shape.etp > 1:  # ranks that share an expert are those that share a layer
        assert shape.groups("etp") == [type(g)("etp", g.ranks) for g in shape.groups("tp")]


@given(shape=shapes())
@settings(max_examples=40, deadline=None)
def test_ranks_of_a_node_are_neighbours_in_the_group_that_shares_the_experts(shape):
    inner = {group.ranks for group in shape.groups("ep_inner")}
    for group in shape.groups("ep"):
        nodes = [group.ranks[first : first + shape.ep_inner] for first in range(0, shape.ep, shape.ep_inner)]
        assert set(nodes) <= inner
        assert {shape.group("ep_outer", rank).ranks for rank in nodes[0]} == set(zip(*nodes))


def test_all_groups_are_made_axis_by_axis():
    shape = MeshShape(pp=2, dp_shard=2, tp=2, ep=2)
    order = [group.axis for group in shape.all_groups(experts=True)]
    assert list(dict.fromkeys(order)) == ["pp", "dp_replicate", "dp_shard", "cp", "tp", "fsdp", "efsdp", "ep", "etp"]
    assert "ep" not in [group.axis for group in shape.all_groups(experts=False)]
    nodes = [group.axis for group in replace(shape, ep=4, ep_inner=2).all_groups(experts=True)]
    assert list(dict.fromkeys(nodes))[-3:] == ["etp", "ep_outer", "ep_inner"]


def node(local=None, **options) -> int | None:
    return MeshShape.from_config(ParallelConfig(**{"ep_kind": "hierarchical"} | options), local=local).ep_inner


def test_the_ranks_of_a_node():
    assert node(dp_shard=8, tp=2, ep=16, ep_inner=4) == 4
    assert node(dp_shard=8, tp=2, ep=16, local=8) == 2  # the ranks of tp
    assert node(dp_shard=16, ep=16, local=8) == 8
    assert node(dp_shard=8, tp=2, etp=2, ep=8, local=8) == 4  # two ranks for each expert
    assert node(dp_shard=8) is None and node(dp_shard=8, ep=8, ep_kind="auto") is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dp_shard": 8, "ep": 8, "ep_inner": 3}, r"parallel.ep_inner 3 does not divide parallel.ep 8: 8 / 3 = 2.67"),
        ({"dp_shard": 8, "ep": 8, "ep_inner": 8}, r"parallel.ep_inner 8 leaves nothing between nodes: parallel.ep is 8"),
        ({"dp_shard": 2, "tp": 4, "ep": 2}, r"by default parallel.tp 4, leaves nothing between nodes: parallel.ep is 2"),
        (
            {"dp_shard": 8, "ep": 8},
            r"by default the 8 ranks of a node, leaves nothing.*set a smaller ep_inner, or parallel.ep_kind all_to_all",
        ),
        ({"dp_shard": 12, "ep": 12, "local": 8}, r"by default the 8 ranks of a node, does not divide parallel.ep 12: 12 / 8 = 1.50"),
        ({"dp_shard": 4, "tp": 4, "etp": 4, "ep": 4, "local": 6}, r"the 6 ranks of a node / parallel.etp 4 = 1.5, does not divide"),
        ({"dp_shard": 8, "ep": 8, "ep_inner": 2, "ep_kind": "auto"}, r"parallel.ep_inner 2 is for parallel.ep_kind hierarchical, not auto"),
    ],
)
def test_what_cannot_be_a_node_is_refused_with_the_arithmetic(options, message):
    with pytest.raises(UserError, match=message):
        node(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"ep": 3, "dp_shard": 2, "cp": 2},
            r"parallel.ep 3 does not divide dp_shard 2 x cp 2 x tp 1 = 4|parallel.ep 3 does not divide dp_shard 2 x cp 2 = 4",
        ),
        ({"ep": 4, "dp_shard": 2, "tp": 2, "etp": 2}, r"parallel.ep 4 does not divide dp_shard 2 x cp 1 = 2"),
        ({"tp": 4, "etp": 2}, r"parallel.etp 2: allowed are 1 and the value of parallel.tp, 4"),
        ({"dp_shard": -1, "tp": 4}, r"6 ranks are not a multiple of the other axes' product 4"),
        ({"pp": 2, "tp": 2}, r"pp 2 x dp_replicate 1 x dp_shard 1 x cp 1 x tp 2 = 4 ranks, 6 were started"),
    ],
)
def test_impossible_products_are_refused_with_the_arithmetic(options, message):
    with pytest.raises(UserError, match=message):
        MeshShape.from_config(ParallelConfig(**options), world=6 if options.get("dp_shard") == -1 or "pp" in options else None)


SHAPES = {
    "experts": MeshShape(pp=2, dp_shard=2, cp=2, tp=2, ep=4),
    "experts of nodes": MeshShape(pp=2, dp_shard=2, cp=2, tp=2, ep=4, ep_inner=2),
    "experts split": MeshShape(dp_replicate=2, dp_shard=2, tp=2, ep=2, etp=2),
    "no experts": MeshShape(pp=2, dp_shard=3, tp=2),
    "one axis": MeshShape(dp_shard=4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_torch_makes_the_same_groups_in_the_same_order_on_every_rank(name):
    from llmtrain.compat import fake_world
    from llmtrain.device import select
    from llmtrain.parallel.mesh import Mesh

    shape = SHAPES[name]
    for rank in range(shape.world):
        with fake_world(rank, shape.world), groups_made() as made:
            mesh = Mesh(shape, device=select("cpu"))
            mine = {axis: mesh.group(axis) for axis in AXES} | {"fsdp": mesh.fsdp.get_group()}
            mine |= {axis: mesh.expert_group(axis) for axis in shape.expert_axes if mesh.experts is not None and axis not in AXES}
            found = {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in mine.items()}
        assert made == expected(shape)
        assert found == {axis: shape.group(axis, rank).ranks for axis in mine}


def test_every_group_gets_options_of_its_own(monkeypatch):
    """As HCCL's groups do: the back end keeps the object. An axis of all ranks, or of one, makes no group to send over."""
    import torch.distributed.device_mesh as device_mesh
    from torch._C._distributed_c10d import Backend

    from llmtrain.compat import fake_world
    from llmtrain.device import select
    from llmtrain.parallel.mesh import Mesh

    shape, made, passed = MeshShape(pp=2, dp_replicate=1, dp_shard=2, cp=2, tp=2, ep=4), [], {}
    original = dist.new_group

    def options():
        made.append(Backend.Options("fake", timedelta(seconds=60 + len(made))))
        return made[-1]

    def recording(ranks=None, *, timeout=None, pg_options=None, group_desc=None, **kwargs):
        if pg_options is not None and 5 in ranks:
            passed.setdefault(group_desc, []).append((pg_options, timeout))
        return original(ranks, timeout=timeout, group_desc=group_desc, **kwargs)

    monkeypatch.setattr(device_mesh, "new_group", recording)
    with fake_world(5, shape.world):
        Mesh(shape, device=select("cpu"), options=options)
    assert sorted(passed) == [f"mesh_{axis}" for axis in ("cp", "dp_shard", "efsdp", "ep", "fsdp", "pp", "tp")]
    taken = [entry for entries in passed.values() for entry in entries]
    assert len({id(option) for option, _ in taken}) == len(taken) == len(made)
    assert all(timeout == option._timeout for option, timeout in taken)
