"""`llmtrain plan search`: the fastest meshes, those that trade time for memory, and the best as a file that runs."""

import argparse
import time
from pathlib import Path

from llmtrain.config.load import load, to_yaml
from llmtrain.config.run import RunConfig
from llmtrain.engine import deepspeed_config, megatron_check
from llmtrain.engine.support import SUPPORT, refusal
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware
from llmtrain.simulate.of_config import case_of
from llmtrain.simulate.rates import fitted
from llmtrain.simulate.search import Found, Result, applied, search
from llmtrain.tools.plan.verb import add_run, asked

GIB = 2**30


def main(argv: list[str]) -> int:
    """Search and print; returns 0."""
    options, overrides = parser().parse_known_args(argv)
    cfg, hardware, devices = asked(options, overrides)
    started = time.perf_counter()
    found = search(cfg, hardware, devices, fitted(), engines=engines(cfg, hardware, options.engines))
    spent = time.perf_counter() - started
    print(f"{found.tried:,} meshes of {devices:,} x {hardware.key} in {spent:.1f} s, {found.fitting:,} fit")
    print(_table("the fastest, event by event", found.best[: options.show]))
    print(_table("nothing is both faster and smaller than these (closed form)", found.pareto[: options.show]))
    print(f"closed form and events differ by at most {found.disagreement:.1%} among the best {len(found.best)}")
    if options.out:
        write(cfg, found, Path(options.out), devices=devices, hardware=hardware)
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan search`."""
    found = argparse.ArgumentParser("llmtrain plan search", description="the best mesh for a run's model, batch and sequence length")
    add_run(found)
    found.add_argument("--show", type=int, default=8, metavar="N", help="how many of each list (default 8)")
    found.add_argument(
        "--engines", metavar="A,B", help="of native, deepspeed, megatron (default: those that docs/engines.md has for the device)"
    )
    found.add_argument("--out", metavar="FILE", help="write the run with the fastest mesh, ready for `llmtrain train -c FILE`")
    return found


def engines(cfg: RunConfig, hardware: Hardware, wanted: str | None) -> tuple[str, ...]:
    """Those to search: by name, or all that run the model on such a device. Raises UserError for one that is not known or does not."""
    device = "npu" if hardware.vendor == "Huawei" else "cuda" if hardware.vendor == "NVIDIA" else "cpu"
    reasons = {name: [refusal(name, device)] if refusal(name, device) else [] for name in SUPPORT}
    reasons["megatron"] += megatron_check.of_model(cfg)
    reasons["deepspeed"] += [found] if (found := deepspeed_config.of_run(cfg, device=device)) else []
    if wanted is None:
        return tuple(name for name, why in reasons.items() if not why)
    for name in wanted.split(","):
        if name not in reasons:
            raise UserError(f"--engines {name}: known are {', '.join(reasons)}")
        if reasons[name]:
            raise UserError(f"--engines {name}: {'; '.join(map(str, reasons[name]))}")
    return tuple(wanted.split(","))


def _table(title: str, found: tuple[Found, ...]) -> str:
    lines = [title, f"  {'step':>9}{'tokens/s/device':>17}{'GiB':>8}  mesh"]
    for one in found:
        speed = one.case.tokens / one.seconds / one.case.devices
        lines.append(f"  {one.seconds:>7.3g} s{speed:>17,.0f}{one.memory / GIB:>8.1f}  {one.mesh}")
    return "\n".join(lines)


def write(cfg: RunConfig, found: Result, path: Path, *, devices: int, hardware) -> None:
    """The run with the best mesh, after a check that it is one that starts."""
    values = cfg.model_dump(mode="json", exclude_unset=False)
    for section, changes in applied(cfg, found.best[0].case).items():
        values[section] = changes if section == "engine" and changes["kind"] != cfg.engine.kind else values[section] | changes
    best = load(values, []).run
    case_of(best, hardware, devices)
    path.write_text(to_yaml(best))
    print(f"wrote {path}: {found.best[0].mesh}")
