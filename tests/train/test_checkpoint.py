"""Checkpoints in one process: what is stored, kept, found, refused, and what a full disk or a flipped bit does."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llmtrain.config.train import CheckpointConfig
from llmtrain.errors import UserError
from llmtrain.train import checkpoint_files as files
from llmtrain.train import checkpoint_state
from llmtrain.train.checkpoint import Checkpointer, CheckpointError

META = {"format": 1, "step": 3, "rng": [1, 2], "loss": 0.1 + 0.2}


def state(fill: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(3, 4, generator=generator) + fill,
        "a.exp_avg": torch.randn(3, 4, generator=generator, dtype=torch.float64) + fill,
        "half": torch.randn(5, generator=generator).bfloat16() + fill,
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "step": torch.tensor(3 + int(fill)),
        "empty": torch.zeros(0, 2),
    }


def saver(folder: Path, said: list | None = None, **cfg) -> Checkpointer:
    return Checkpointer(
        folder, CheckpointConfig(**{"asynchronous": False, "keep_last": 10, **cfg}), log=[].append if said is None else said.append
    )


def same_bits(one: dict, other: dict) -> bool:
    as_bytes = ({name: (t.dtype, t.reshape(-1).view(torch.uint8).tolist()) for name, t in s.items()} for s in (one, other))
    return next(as_bytes) == next(as_bytes)


def save(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, state(step), {"step": step})
    checkpointer.wait()
    assert checkpointer.failed is None


def names(checkpointer: Checkpointer) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in checkpointer.checkpoints.iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path, asynchronous):
    checkpointer = saver(tmp_path, asynchronous=asynchronous)
    checkpointer.save(100, state(), META)
    path = checkpointer.newest()
    assert path == tmp_path / "checkpoints" / "step-00000100" == (tmp_path / "latest").resolve()
    loaded = {name: torch.full_like(tensor, 9) for name, tensor in state().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in loaded.items()}
    assert saver(tmp_path).load(path, loaded) == META
    assert same_bits(loaded, state())
    assert addresses == {name: tensor.data_ptr() for name, tensor in loaded.items()}
    (message,) = checkpointer.poll()
    assert str(path) in message and " s, " in message and " MB" in message
    assert checkpointer.poll() == []


@contextmanager
def writing_held(monkeypatch):
    """While the block runs, background writes wait for the event that it gets."""
    release, real = threading.Event(), checkpoint_state.write

    def write(*args, **kwargs):
        assert release.wait(30)
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint_state, "write", write)
    yield release
    release.set()


def test_the_state_may_change_as_soon_as_save_returns(tmp_path, monkeypatch):
    checkpointer, live = saver(tmp_path, asynchronous=True), state()
    with writing_held(monkeypatch):
        checkpointer.save(1, live, META)
        assert checkpointer.poll() == []
        for tensor in live.values():
            tensor.zero_()
    loaded = state(5)
    checkpointer.load(checkpointer.newest(), loaded)
    assert same_bits(loaded, state())


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path, monkeypatch):
    said = []
    checkpointer = saver(tmp_path, said, asynchronous=True)
    with writing_held(monkeypatch) as release:
        checkpointer.save(1, state(1), META)
        threading.Timer(0.2, release.set).start()
        checkpointer.save(2, state(2), META)
    assert len(said) == 1 and said[0].startswith("step 2 waited 0.") and "checkpoint.every" in said[0]
    assert len(checkpointer.poll()) >= 1
    loaded = state()
    checkpointer.wait()
    checkpointer.load(tmp_path / "checkpoints" / "step-00000001", loaded)
    assert same_bits(loaded, state(1))  # the second copy went into the same buffers, but not before the first was written


def test_staging_buffers_are_reused(tmp_path):
    stage = checkpoint_state.Stage()
    first = {name: tensor.data_ptr() for name, tensor in stage.copy(state()).items()}
    second = stage.copy(state(1))
    assert first == {name: tensor.data_ptr() for name, tensor in second.items()} and same_bits(second, state(1))


@pytest.mark.parametrize(
    ("cfg", "left"),
    [({"keep_last": 2}, "4 5"), ({"keep_last": 1, "keep_every": 2}, "2 4 5"), ({"keep_last": 9}, "1 2 3 4 5")],
)
def test_retention(tmp_path, cfg, left):
    checkpointer = saver(tmp_path, **cfg)
    save(checkpointer, 1, 2, 3, 4, 5)
    assert names(checkpointer) == left.split()


def test_a_run_that_went_back_continues_on_its_own_branch(tmp_path):
    save(saver(tmp_path), 1, 2, 3)
    again = saver(tmp_path, keep_last=2)
    assert again.find(str(tmp_path / "checkpoints" / "step-00000001")).name == "step-00000001"
    assert names(again) == ["1", "2", "3"]
    again.save(2, state(20), META)
    again.wait()
    assert again.newest().name == "step-00000002"
    loaded = state()
    again.load(again.newest(), loaded)
    assert same_bits(loaded, state(20)) and names(again) == ["2", "3"]


def test_leftovers_of_a_killed_run(tmp_path):
    save(saver(tmp_path), 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000003.partial").mkdir()
    (folder / "step-00000003.partial" / "__0_0.distcp").write_bytes(b"x")
    (folder / "step-00000002").rename(folder / "step-00000002.replaced")
    said = []
    reader = Checkpointer(tmp_path, CheckpointConfig(), log=said.append, writable=False)
    assert reader.newest().name == "step-00000001" and not said and len(list(folder.iterdir())) == 3
    checkpointer = saver(tmp_path, said)
    assert names(checkpointer) == ["1", "2"] and checkpointer.newest().name == "step-00000002"
    assert len(said) == 2 and "put back" in said[0] and "removed" in said[1]


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the program handles it."""


def die_before(monkeypatch, operation: int) -> None:
    """Let the `operation`-th renaming or deletion from now on, and all after it, not happen; a deletion happens in part."""
    count = 0

    def dying(real, partly):
        def call(path, *args):
            nonlocal count
            count += 1
            if count >= operation:
                partly(path)
                raise Killed
            return real(path, *args)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename, lambda path: None))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree, lambda path: next(Path(path).iterdir()).unlink()))


@pytest.mark.parametrize("operation", range(1, 7))
def test_killed_between_any_two_steps_of_publishing(tmp_path, monkeypatch, operation):
    save(saver(tmp_path), 1, 2)
    checkpointer, said = saver(tmp_path, keep_last=1), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_before(patch, operation)
        checkpointer.save(2, state(20), META)  # DCP renames; the old goes aside, the new comes, the old is deleted; 1 is renamed, deleted
    after = saver(tmp_path, said)
    assert after.newest().name == "step-00000002" and not [text for text in said if "damaged" in text]
    loaded = state()
    after.load(after.newest(), loaded)
    assert same_bits(loaded, state(2) if operation <= 3 else state(20))
    assert names(after) == (["1", "2"] if operation <= 5 else ["2"])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json", "manifest.json"])
@pytest.mark.parametrize("where", [0.0, 0.37, 0.5, 0.99999])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path, name, where):
    said = []
    checkpointer = saver(tmp_path, said)
    save(checkpointer, 1, 2)
    file = tmp_path / "checkpoints" / "step-00000002" / name
    data = bytearray(file.read_bytes())
    data[min(int(len(data) * where), len(data) - 1)] ^= 4
    file.write_bytes(data)
    assert checkpointer.newest().name == "step-00000001"
    assert len(said) == 1 and name in said[0] and "step-00000002" in said[0] and "the one before" in said[0]
    if name != "manifest.json":
        assert "sha256" in said[0] and "expected" in said[0]
    with pytest.raises(CheckpointError, match=r"is damaged"):
        checkpointer.find(str(file.parent))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json", "manifest.json"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_a_short_or_missing_file_is_found(tmp_path, name, how):
    said = []
    checkpointer = saver(tmp_path, said)
    save(checkpointer, 1, 2)
    file = tmp_path / "checkpoints" / "step-00000002" / name
    file.unlink() if how == "gone" else file.write_bytes(file.read_bytes()[:-1])
    assert checkpointer.newest().name == "step-00000001" and name in said[0]


def test_nothing_to_find(tmp_path):
    said = []
    checkpointer = saver(tmp_path, said)
    assert checkpointer.newest() is None and checkpointer.find("auto") is None
    save(checkpointer, 1)
    assert checkpointer.find("none") is None and checkpointer.find("auto").name == "step-00000001"
    assert checkpointer.find(str(tmp_path / "latest")).name == "step-00000001"
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001" / "nothing", ignore_errors=True)
    (tmp_path / "checkpoints" / "step-00000001" / "meta.json").unlink()
    assert checkpointer.newest() is None and "meta.json: No such file" in said[0]


@pytest.mark.parametrize(
    ("resume", "problem"),
    [("nowhere", "is no folder"), ("step-00000003.partial", "not written to its end"), ("empty", "no manifest.json")],
)
def test_a_path_that_is_no_checkpoint(tmp_path, resume, problem):
    checkpointer = saver(tmp_path)
    for name in ("step-00000003.partial", "empty"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"checkpoint.resume: .*{resume} .*{problem}"):
        checkpointer.find(str(tmp_path / resume))


def test_loading_is_strict(tmp_path):
    said = []
    checkpointer = saver(tmp_path, said)
    save(checkpointer, 1)
    other = state()
    other["b.weight"], other["a.weight"] = other.pop("half"), torch.zeros(4, 3)
    with pytest.raises(CheckpointError) as error:
        checkpointer.load(checkpointer.newest(), other)
    assert "not in the checkpoint: b.weight" in str(error.value) and "only in the checkpoint: half" in str(error.value)
    assert "a.weight has shape [3, 4] in the checkpoint and [4, 3] in the run" in str(error.value)
    wide = {**state(), "a.weight": torch.zeros(3, 4, dtype=torch.float64)}
    checkpointer.load(checkpointer.newest(), wide)
    assert said == [said[0]] and "a.weight (float32 -> float64)" in said[0]
    assert torch.equal(wide["a.weight"], state(1)["a.weight"].double())


def test_another_format_is_refused(tmp_path):
    said = []
    checkpointer = saver(tmp_path, said)
    save(checkpointer, 1)
    path = tmp_path / "checkpoints" / "step-00000001"
    body = files.read_manifest(path) | {"format": 2}
    (path / files.MANIFEST).write_bytes(files.render_manifest(body))
    with pytest.raises(CheckpointError, match=r"checkpoint format 2; this version of llmtrain reads format 1"):
        checkpointer.load(path, state())


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def forge(path: Path, **content: bytes) -> None:
    """Replace files and make the manifest agree, as someone would who hands a checkpoint on."""
    body = files.read_manifest(path)
    body.pop("sha256", None)
    for name, data in content.items():
        name = {"metadata": ".metadata", "tensors": "__0_0.distcp"}[name]
        (path / name).write_bytes(data)
        body["files"][name] = files.file_entry(path / name)
    (path / files.MANIFEST).write_bytes(files.render_manifest(body))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_table_of_contents_is_not_run(tmp_path, protocol):
    checkpointer = saver(tmp_path)
    save(checkpointer, 1)
    path, trace = checkpointer.newest(), tmp_path / "trace"
    forge(path, metadata=pickle.dumps(Evil(trace), protocol=protocol))
    assert not files.damage(path)
    with pytest.raises(CheckpointError, match=r"\.metadata refused: it asks for (posix|nt|os)\.system"):
        checkpointer.load(path, state())
    assert not trace.exists()


@pytest.mark.parametrize(
    "module, name", [("builtins", "eval"), ("torch", "load"), ("torch.serialization", "os.system"), ("torch", "Size.mro")]
)
def test_the_unpickler_knows_only_what_a_table_consists_of(module, name):
    unpickler = checkpoint_state.MetadataUnpickler(io.BytesIO())
    with pytest.raises(pickle.UnpicklingError):
        unpickler.find_class(module, name)


def test_malicious_tensors_are_not_run(tmp_path):
    checkpointer = saver(tmp_path)
    save(checkpointer, 1)
    path, trace = checkpointer.newest(), tmp_path / "trace"
    torch.save(Evil(trace), tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    table = checkpoint_state.read_metadata(path)
    for info in table.storage_data.values():
        info.offset, info.length = 0, len(evil)
    forge(path, metadata=pickle.dumps(table), tensors=evil)
    with pytest.raises(CheckpointError, match=r"(?i)weights.only"):
        checkpointer.load(path, state())
    assert not trace.exists()


def test_a_table_that_points_outside_is_refused(tmp_path):
    checkpointer = saver(tmp_path)
    save(checkpointer, 1)
    path = checkpointer.newest()
    table = checkpoint_state.read_metadata(path)
    next(iter(table.storage_data.values())).relative_path = "../../elsewhere"
    forge(path, metadata=pickle.dumps(table))
    with pytest.raises(CheckpointError, match=r"points to \.\./\.\./elsewhere"):
        checkpointer.load(path, state())


def test_no_path_of_this_machine_is_stored(tmp_path):
    checkpointer = saver(tmp_path)
    save(checkpointer, 1)
    assert all(str(tmp_path).encode() not in p.read_bytes() for p in checkpointer.newest().iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("place", ["write", "render_manifest", "sync"])
def test_a_failed_save_loses_nothing_and_the_next_is_tried(tmp_path, monkeypatch, asynchronous, place):
    checkpointer = saver(tmp_path, asynchronous=asynchronous)
    save(checkpointer, 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_state if place == "write" else files, place, fail)
        checkpointer.save(2, state(2), META)
        checkpointer.wait()
    assert checkpointer.failed == "No space left on device: somewhere"
    *_, message = checkpointer.poll()
    assert message.startswith("checkpoint of step 2 failed: No space left on device: somewhere") and "\n" not in message
    assert names(checkpointer) == ["1"] and checkpointer.newest().name == "step-00000001"
    save(checkpointer, 3)
    assert checkpointer.failed is None and checkpointer.newest().name == "step-00000003"


def test_meta_that_json_cannot_hold_is_an_error_at_once(tmp_path):
    with pytest.raises(TypeError):
        saver(tmp_path).save(1, state(), {"tensor": torch.zeros(1)})


@contextmanager
def small_disk(folder: Path):
    """A tmpfs of 1 MB at `folder`, or else a limit on the size of a file."""
    mounted = (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        yield "No space left on device" if mounted else "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("elements", [100_000, 120_001])
def test_a_full_disk_loses_nothing(tmp_path, asynchronous, elements):
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk") as reason:
        checkpointer = saver(tmp_path / "disk", asynchronous=asynchronous, keep_last=1)
        small = {"a": torch.arange(40_000.0)}
        checkpointer.save(1, small, META)
        checkpointer.wait()
        assert checkpointer.failed is None
        filler = tmp_path / "disk" / "filler"
        filler.write_bytes(bytes(250_000))
        for step in (2, 3):
            checkpointer.save(step, {"a": torch.arange(float(elements) * 2)}, META)
            checkpointer.wait()
            assert reason in checkpointer.failed and "distcp" in checkpointer.failed
            assert names(checkpointer) == ["1"]
        loaded = {"a": torch.zeros(40_000)}
        assert checkpointer.load(checkpointer.newest(), loaded) == META and torch.equal(loaded["a"], small["a"])
        filler.unlink()
        checkpointer.save(4, small, META)
        checkpointer.wait()
        assert checkpointer.failed is None and names(checkpointer) == ["4"]


def test_the_manifest_is_readable_without_torch(tmp_path):
    save(saver(tmp_path), 1)
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 1 and manifest["serial"] == 1
    assert sorted(manifest["files"]) == [".metadata", "__0_0.distcp", "meta.json"]
