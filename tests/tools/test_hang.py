"""One rank of a real run misbehaves: the report names it, and no process is left."""

import re

import pytest
from hang_runs import OLD_GLOO, STEP, TIMEOUT, Case, run_all

DP = ("--parallel.dp_shard", "2")
DP_4, REPLICAS = ("--parallel.dp_shard", "4"), ("--parallel.dp_replicate", "2")
TP, CP = ("--parallel.tp", "2"), ("--parallel.cp", "2")
EP = ("--parallel.ep", "2", "--model.ffn.kind", "moe")
FAULTS = {  # what happens before which collective, and the options of the run
    "backward": Case({"act": "sleep", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
    "sum": Case({"act": "sleep", "axis": "world", "rank": 0}, DP),
    "stop": Case({"act": "stop", "axis": "world", "rank": 0}, DP),
    "hold": Case({"act": "hold", "axis": "dp_shard", "rank": 1, "direction": "forward"}, DP),
    "raise": Case({"act": "raise", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
    "die": Case({"act": "die", "axis": "dp_shard", "rank": 1, "direction": "backward"}, DP),
    "pause": Case({"act": "pause", "axis": "world", "rank": -1}, (*DP, "--train.steps", "6")),
}


def asleep(axis: str, *words: str, ranks: int = 2, **fault) -> Case:
    """Rank 1 sleeps before a collective of `axis`."""
    return Case({"act": "sleep", "axis": axis, "rank": 1, **fault}, words, ranks)


def blind(axis: str, *words: str, **fault) -> Case:
    """The same where torch's flight recorder knows nothing, as with HCCL."""
    return asleep(axis, *words, blind=True, **fault)


# Which collective of step 3 it is, told by the order of calls alone; the layer that a rank must be said to wait at, and that of rank 1.
AXES = {
    "dp_shard": (blind("dp_shard", *DP, op="all_gather", nth=3), "block 1 forward", "block 1 forward"),  # the embedding's is the first
    # FSDP2 sums over replicas by itself: the flight recorder knows that.
    "dp_replicate": (asleep("dp_replicate", *REPLICAS, op="all_reduce", inside="backward"), "head backward", "head backward"),
    "tp": (blind("tp", *TP, op="all_gather", inside="qkv", nth=2), "block 1 forward", "block 1 forward"),
    "cp": (blind("cp", *CP, op="all_gather", inside="attend", nth=3), "block 2 forward", "block 2 forward"),
    "pp": (blind("pp", "--parallel.pp", "2", op="recv"), "block 1 backward", "block 2 forward"),
    "ep": (blind("ep", *DP, *EP, op="all_to_all", nth=5), "block 1 forward", "block 1 forward"),  # three a layer
    "efsdp": (blind("efsdp", *DP_4, *EP, ranks=4, op="all_gather", nth=2), "block 1 forward", "block 1 forward"),
    "fsdp": (blind("fsdp", *DP, *CP, ranks=4, op="reduce_scatter", nth=2), "block 2 backward", "block 2 backward"),  # after the head's
}
WAITING = {"efsdp": "3"}
"""The rank that waits for rank 1 in the axis' own group, where that is not rank 0."""
ELSEWHERE = {"efsdp": "rank 1 did not arrive at all_to_all of group ep; rank 0"}
"""What is said instead where another rank has waited for rank 1 longer, in another group."""
# The same where ranks do not wait in their collectives but later, where they read from their devices.
DEVICES = {
    "dp_shard": (blind("dp_shard", *DP, op="all_gather", nth=3, asynchronous=True), "block 1 forward"),
    "tp": (blind("tp", *TP, op="reduce_scatter", inside="attention_output", nth=2, asynchronous=True), "block 1 forward"),
    "ep": (blind("ep", *DP, *EP, op="all_to_all", nth=5, asynchronous=True), "block 1 forward"),
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("faults"), FAULTS)


@pytest.fixture(scope="module")
def axes(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("axes"), {axis: case for axis, (case, *_) in AXES.items()})


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("devices"), {axis: case for axis, (case, _) in DEVICES.items()})


def test_sleep_before_a_collective_of_the_backward_pass(faults):
    found = faults["backward"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 1 did not arrive at" in found.err and "of group dp_shard; rank 0 waited" in found.err
    rows = found.rows()
    assert "waits" in rows["0"] and "dp_shard" in rows["0"] and "block 2 backward" in rows["0"]
    assert "runs" in rows["1"] and "block 2 backward" in rows["1"] and f" {STEP} " in rows["1"]
    assert "in _sleep" in found.err, "the stack of the rank that did not arrive"
    assert found.err.count("did not arrive") == 1 and "Traceback" not in found.err


def test_sleep_before_the_loop_s_own_sum(faults):
    found = faults["sum"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 0 did not arrive at all_reduce of group world; rank 1 waited" in found.err


def test_a_stopped_rank_0(faults):
    found = faults["stop"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert found.err.count("rank 0 did not arrive at all_reduce of group world") == 1
    assert "rank 0 is stopped by a signal" in found.err and f"last seen at step {STEP}" in found.err


def test_a_rank_that_holds_the_interpreter(faults):
    found = faults["hold"]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert "rank 1 does not answer" in found.err
    assert "in _hold" in found.err, "its stack, by signal"


def test_a_rank_that_raises(faults):
    found = faults["raise"]
    assert found.code == 1 and found.left == 0 and found.took < TIMEOUT
    assert "rank 1 raised KeyError: 'a fault of this rank alone'; last seen at step 3" in found.err
    assert "it failed on rank 0: Connection closed by peer" in found.err


def test_a_rank_that_is_killed(faults):
    found = faults["die"]
    assert found.code == 137 and found.left == 0 and found.took < TIMEOUT
    assert f"rank 1 has ended; last seen at step {STEP}, training, block 2 backward" in found.err


@pytest.mark.parametrize("axis", AXES)
def test_sleep_in_each_axis(axes, axis):
    found, (case, there, last) = axes[axis], AXES[axis]
    assert found.code == 3 and found.left == 0 and found.in_time()
    if OLD_GLOO and axis == "efsdp":  # rank 3 waits in C++, unseen
        assert ELSEWHERE[axis] in found.err
        return
    assert_absent(found, axis, case.fault["op"], there=there, last=last)


@pytest.mark.parametrize("axis", DEVICES)
def test_sleep_where_the_others_wait_for_their_devices(devices, axis):
    found, (case, layer) = devices[axis], DEVICES[axis]
    assert found.code == 3 and found.left == 0 and found.in_time()
    assert_absent(found, axis, case.fault["op"], there=layer, last=layer)


def assert_absent(found, axis, op, *, there, last):
    """Rank 1 is said not to have arrived at `op` of `axis` at the layer `there`, and to have been seen last at layer `last`."""
    waiting = WAITING.get(axis, "0")
    here = re.search(rf"rank 1 did not arrive at {op} of group (\w+/)*{axis}(/\w+)*; ranks? {waiting}\b", found.err)
    assert here or (axis in ELSEWHERE and ELSEWHERE[axis] in found.err)
    assert re.match(rf"{waiting} +waits +{op}.* (\w+/)*{axis}(/\w+)* ", found.rows()[waiting]) and re.match("1 +runs ", found.rows()["1"])
    assert (found.layers()[waiting], found.layers()["1"]) == (there, last)
    assert f"last seen at step {STEP}, training, {last}" in found.err


def test_long_work_outside_of_collectives_is_no_hang(faults):
    found = faults["pause"]
    assert found.code == 0 and found.report == "" and found.left == 0
