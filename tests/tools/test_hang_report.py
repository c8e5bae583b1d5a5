"""The report as text, and the record that it is made from."""

import mmap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmtrain.parallel.hang import report as hang_report
from llmtrain.parallel.hang import where
from llmtrain.parallel.hang.record import BACKWARD, COUNTS, DEVICE, FORWARD, SIZE, Field, Record, decode
from llmtrain.parallel.hang.settle import Step, begun_by, settle


def waits(rank, op="all_reduce", group="tp", members=(0, 1), **more):
    place = {"step": 4, "phase": "training", "layer": "block 7", "direction": "backward", "micro_batch": 1, "peer": -1}
    inside = {"op": op, "group": group, "members": list(members), "seconds": 9.0, "sequence": 3}
    return {"rank": rank, "state": "waits", "at": "llmtrain/x.py:1 in f", "frames": ["llmtrain/x.py:1 in f"], **place, **inside, **more}


def runs(rank, **more):
    return waits(rank, state="runs", seconds=None, **more)


def reports(*made):
    return {report["rank"]: report for report in made}


def first_line(made):
    return hang_report.render(made, timeout=8.0).splitlines()[0]


def test_blame_goes_through_groups():
    """Rank 3 sleeps in tp; its tp mate waits for it there, the others for the mate in dp."""
    made = reports(
        waits(0, "all_gather", "dp_shard", (0, 2)), waits(1, "all_gather", "dp_shard", (1, 3)), waits(2, members=(2, 3)), runs(3)
    )
    assert hang_report.absent(made) == [3]
    assert "rank 3 did not arrive at" in first_line(made)


def test_a_chain_of_pipeline_stages_ends_at_the_rank_that_computes():
    made = reports(waits(0, "recv", "pp", range(3), peer=1), waits(1, "recv", "pp", range(3), peer=2), runs(2))
    assert hang_report.absent(made) == [2]


def test_a_send_meets_its_receive():
    made = reports(waits(0, "send", "pp", range(3), peer=1), waits(1, "recv", "pp", range(3), peer=0), runs(2))
    assert hang_report.absent(made) == []


def test_another_group_of_the_same_axis_is_another_collective():
    made = reports(waits(0, members=(0, 1)), waits(1, members=(0, 1)), waits(2, members=(2, 3)), runs(3))
    assert hang_report.absent(made) == [3] and "rank 3 did not arrive" in first_line(made)


def test_ranks_that_call_in_different_order():
    made = reports(waits(0), waits(1, "all_gather", "world"))
    assert "different collectives" in first_line(made) and hang_report.absent(made) == []


def test_everyone_in_the_same_collective():
    assert "ranks 0-1 all are in all_reduce of group tp and it does not end" in first_line(reports(waits(0), waits(1)))


def test_ranks_at_the_same_place_share_a_row():
    made = reports(*(waits(rank, group="world", members=range(1000), seconds=9 + rank / 1e5) for rank in range(999)), runs(999))
    table = hang_report.table(made).splitlines()
    assert len(table) == 3 and table[1].startswith("0-998 ") and table[2].startswith("999 ")
    assert len(hang_report.table(reports(waits(0), waits(1))).splitlines()) == 3, "few ranks have a row each"


def test_the_record_is_read_from_shared_memory():
    record, memory = Record(), mmap.mmap(-1, SIZE)
    record.slots[Field.OP] = record.number("all_reduce")
    record.attach(memoryview(memory))
    record.slots[Field.GROUP], record.slots[Field.STEP] = record.number("tp"), 12
    found = decode(memory[:])
    assert (found["op"], found["group"], found["step"], found["micro_batch"]) == ("all_reduce", "tp", 12, -1)
    record.detach()
    memory.close()
    assert record.read()["group"] == "tp"


def test_more_names_than_fit():
    record = Record()
    numbers = [record.number(f"a rather long name of a layer, number {n}") for n in range(400)]
    record.slots[Field.LAYER] = numbers[-1]
    assert record.read()["layer"] == "..." and numbers[-1] == numbers[-2]
    record.slots[Field.LAYER] = numbers[0]
    assert record.read()["layer"].endswith("number 0")


def test_nested_collectives_and_one_that_fails():
    with where.recorded("outer", "world"):
        with where.recorded("inner", "tp", peer=3):
            assert (where.HERE.read()["op"], where.HERE.read()["peer"]) == ("inner", 3)
        assert (where.HERE.read()["op"], where.HERE.read()["peer"]) == ("outer", -1)
    assert where.HERE.read()["op"] is None
    with pytest.raises(RuntimeError), where.recorded("broken", "tp"):
        raise RuntimeError
    assert where.HERE.read()["op"] == "broken", "the report names it"
    where.HERE.slots[Field.OP] = 0


def test_layers_are_marked_in_both_directions(monkeypatch):
    seen = []
    model = nn.Module()
    model.blocks = nn.ModuleDict({"4": nn.Linear(2, 2), "5": nn.Linear(2, 2)})
    where.watch_layers(model)
    monkeypatch.setattr(where, "HERE", SimpleNamespace(slots=Spy(seen), number=where.HERE.number))
    x = torch.ones(1, 2)
    for block in model.blocks.values():
        x = block(x)
    x.sum().backward()
    four, five = where.HERE.number("block 4"), where.HERE.number("block 5")
    assert seen == [(four, FORWARD), (five, FORWARD), (five, BACKWARD), (four, BACKWARD)]


class Spy(dict):
    """Slots that note every layer marked."""

    def __init__(self, seen):
        super().__init__(dict.fromkeys(Field, 0))
        self.seen = seen

    def __setitem__(self, field, value):
        super().__setitem__(field, value)
        if field == Field.DIRECTION:
            self.seen.append((self[Field.LAYER], value))


def on_device(rank, counts, begun=()):
    """A rank that waits for its device, or for nothing if it has begun nothing."""
    state = "waits" if begun else "runs"
    inside = {"op": DEVICE, "group": "-", "members": (), "sequence": None, "counts": counts, "begun": begun, "groups": {"tp": [0, 1]}}
    return waits(rank, state=state, **inside)


def test_a_device_is_held_up_in_the_first_collective_that_another_rank_has_not_begun():
    begun = [Step("world", 2, "all_reduce", "world", -1, None, None, -1)]
    begun += [Step("tp", number, "all_gather", "tp", -1, f"block {number}", "forward", 0) for number in (6, 7, 8)]
    made = reports(on_device(0, {"world": 2, "tp": 8}, begun), on_device(1, {"world": 2, "tp": 6}))
    found = settle(made)[0]
    assert (found["op"], found["group"], found["sequence"], found["members"]) == ("all_gather", "tp", 7, [0, 1])
    assert (found["layer"], found["direction"], found["micro_batch"]) == ("block 7", "forward", 0)
    assert first_line(made).startswith("hang: rank 1 did not arrive at all_gather of group tp; rank 0 waited there")
    assert settle(made)[1] == made[1]


def test_a_device_waits_for_the_other_end_of_a_send():
    begun = [Step("pp 0>3", 5, "send", "pp", 3, "block 1", "forward", 0), Step("pp 3>0", 5, "recv", "pp", 3, "block 1", "backward", 0)]
    made = reports(on_device(0, {"pp 0>3": 5, "pp 3>0": 5}, begun), on_device(3, {"pp 0>3": 5, "pp 3>0": 4}))
    found = settle(made)[0]
    assert (found["op"], found["peer"], found["members"], found["direction"]) == ("recv", 3, [0, 3], "backward")
    assert "rank 3 did not arrive at recv of group pp" in first_line(made)


def test_devices_that_wait_for_nobody_name_the_last_collective_begun():
    begun = [Step("tp", number, "all_gather", "tp", -1, f"block {number}", "forward", 0) for number in (1, 2)]
    made = reports(*(on_device(rank, {"tp": 2}, begun) for rank in range(2)))
    assert "ranks 0-1 all are in all_gather of group tp and it does not end" in first_line(made)
    assert settle(made)[0]["layer"] == "block 2"


def test_collectives_that_were_begun_are_remembered_until_a_device_has_been_read():
    record = where.HERE
    with where.device_wait():
        assert record.read()["op"] == DEVICE
    assert not record.begun
    before = record.read()["counts"].get("tp", 0)
    where.at(phase="test")  # as no micro-batch of a test before
    where.mark(record.number("block 3"), BACKWARD)
    where.count("all_gather", "tp")
    with where.recorded("reduce_scatter", "tp"), where.recorded("reduce_scatter", "tp", begun=True):
        pass
    first, second = begun_by(record)
    assert first == Step("tp", before + 1, "all_gather", "tp", -1, "block 3", "backward", -1)
    assert (second.op, second.number) == ("reduce_scatter", before + 2)
    assert record.read()["counts"]["tp"] == before + 2
    with where.device_wait():
        pass
    assert begun_by(record) == []


def test_more_groups_than_there_is_room_for():
    record = Record()
    places = [record.count_of(f"group {number}") for number in range(COUNTS + 2)]
    assert places[-2:] == [0, 0] and len(set(places)) == COUNTS + 1 and record.count_of("group 1") == places[1]
