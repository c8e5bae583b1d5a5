"""Kill a training run with SIGKILL at random moments, saves included, and resume it, over and over.

    python bench/kills.py --kills 50            # writes bench/results/kills-cpu.md

The run is the quickstart's (two ranks, real text, asynchronous checkpoints every 4 steps) made short. Victims: the launcher, a rank, or
all of them; a third of the kills wait for a `.partial` checkpoint to appear. Checked after every kill: no process is left; the newest
complete checkpoint verifies; no more than the steps since the last complete checkpoint are gone. Checked at the end: every loss ever
recorded equals the loss of the same step of a run that was never killed, bit for bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
EVERY = 4
STEPS = 60


def command(folder: Path, name: str, steps: int) -> list[str]:
    """The quickstart, made short, with a checkpoint every few steps."""
    options = {
        "name": name,
        "output": str(folder),
        "train.steps": steps,
        "train.seq_len": 128,
        "train.validate_every": 0,
        "train.validate_samples": 4,
        "checkpoint.every": EVERY,
        "checkpoint.export": "none",
        "metrics.tensorboard": "false",
        "metrics.bigram_baseline": "false",
        "metrics.sample": "null",
        "data.validation": "[]",
    }
    words = [sys.executable, "-m", "llmtrain", "train", "-c", str(ROOT / "configs/quickstart.yaml")]
    return words + [f"--{key}={value}" for key, value in options.items()]


def losses(folder: Path) -> dict[int, float]:
    """Loss per step as recorded; a half-written last line is passed over."""
    found = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if values.get("kind") == "train":
            found[values["step"]] = values["loss"]
    return found


def complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(int(name.removeprefix("step-")) for name in names)


def family(pid: int) -> list[psutil.Process]:
    """The launcher and its ranks."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint is being written that was begun after `since`; an older one is what the last kill left."""
    try:
        return any(path.stat().st_ctime > since for path in (folder / "checkpoints").glob("*.partial"))
    except FileNotFoundError:  # renamed in between: complete
        return False


def wait_for_moment(folder: Path, process: subprocess.Popen, rng: random.Random, *, since: float) -> str:
    """Sleep a random while, or until a checkpoint is being written; says which."""
    if rng.random() < 1 / 3:
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if being_written(folder, since):
                time.sleep(rng.random() * 0.03)
                return "in a save"
            time.sleep(0.002)
        return "no save seen"
    deadline = time.time() + rng.uniform(0.5, 20)
    while time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    return "at random"


def kill(process: subprocess.Popen, rng: random.Random) -> str:
    """SIGKILL a victim and wait until the whole family is gone."""
    members = family(process.pid)
    victim = rng.choice(["launcher", "a rank", "all"])
    ranks = members[1:]
    chosen = members if victim == "all" or not ranks else [members[0]] if victim == "launcher" else [rng.choice(ranks)]
    for member in chosen:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(60)
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive, f"left behind after killing {victim}: {alive}"
    return victim


def one_life(folder: Path, name: str, rng: random.Random) -> dict:
    """Start (or resume) the run, kill it at some moment, check what is left."""
    run = folder / name
    before = complete(run)
    log = (folder / f"{name}.log").open("a")
    since = time.time()
    process = subprocess.Popen(command(folder, name, STEPS), stdout=log, stderr=log, cwd=ROOT)
    moment = wait_for_moment(run, process, rng, since=since)
    if process.poll() is not None:
        assert process.returncode == 0, f"ended with {process.returncode}: {(folder / f'{name}.log').read_text()[-3000:]}"
        return {"finished": True}
    partial = being_written(run, since)
    victim = kill(process, rng)
    reached, kept = max(losses(run), default=0), complete(run)
    assert not before or (kept and kept[-1] >= before[-1]), f"a complete checkpoint was lost: {before} -> {kept}"
    # A save that was under way when the kill came may be lost with the steps since the one before it.
    lost = reached - (kept[-1] if kept else 0)
    assert lost <= 2 * EVERY, f"{lost} steps lost: reached {reached}, checkpoints {kept}"
    return {"finished": False, "moment": moment, "victim": victim, "partial": partial, "reached": reached, "kept": kept, "lost": lost}


def campaign(kills: int, seed: int) -> dict:
    """Kill `kills` times over as many runs as that takes; returns what happened."""
    rng = random.Random(seed)
    lives, names, started = [], [], time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        subprocess.run(command(folder, "whole", STEPS), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        whole = losses(folder / "whole")
        assert len(whole) == STEPS
        while sum(not life["finished"] for life in lives) < kills or not lives[-1]["finished"]:
            if not lives or lives[-1]["finished"]:
                names.append(f"killed-{len(names)}")
            enough = sum(not life["finished"] for life in lives) >= kills
            if enough:
                subprocess.run(command(folder, names[-1], STEPS), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
                lives.append({"finished": True})
            else:
                lives.append(one_life(folder, names[-1], rng))
            print(f"{len(lives):3d} {names[-1]} {lives[-1]}", flush=True)
        for name in names:
            recorded = losses(folder / name)
            assert recorded == whole, f"{name} differs at {[s for s in whole if recorded.get(s) != whole[s]][:5]}"
    killed = [life for life in lives if not life["finished"]]
    return {
        "kills": len(killed),
        "runs": len(names),
        "in_save": sum(life["partial"] for life in killed),
        "victims": {v: sum(life["victim"] == v for life in killed) for v in ("launcher", "a rank", "all")},
        "largest_loss": max(life["lost"] for life in killed),
        "minutes": (time.time() - started) / 60,
    }


def main() -> None:
    """Run the campaign and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/kills-cpu.md")
    args = parser.parse_args()
    done = campaign(args.kills, args.seed)
    text = f"""# Kills survived

`python bench/kills.py --kills {args.kills} --seed {args.seed}`, {time.strftime("%Y-%m-%d")}, 2 CPU cores, two ranks over gloo.

| | |
|---|---|
| kills (SIGKILL) | {done["kills"]}, over {done["runs"]} runs of {STEPS} steps, a checkpoint every {EVERY} |
| victims | {", ".join(f"{v}: {n}" for v, n in done["victims"].items())} |
| while a checkpoint was being written | {done["in_save"]} |
| processes left behind | 0 |
| complete checkpoints lost | 0 |
| most steps to do again after a kill | {done["largest_loss"]} |
| runs whose every loss equals the never-killed run's, bit for bit | {done["runs"]} of {done["runs"]} |
| time | {done["minutes"]:.0f} min |
"""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
