"""`llmtrain plan`: the words, and which part of the planner they ask for."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.arguments import parse_run_arguments
from llmtrain.config.run import RunConfig
from llmtrain.errors import UserError
from llmtrain.hardware import Hardware, keys, load
from llmtrain.simulate.events import replay
from llmtrain.simulate.of_config import case_of
from llmtrain.simulate.rates import fitted

PARTS = {
    "errors": "llmtrain.tools.plan.error_table",
    "search": "llmtrain.tools.plan.search_report",
    "shapes": "llmtrain.tools.plan.shape_report",
    "papers": "llmtrain.tools.plan.papers",
    "calibrate": "llmtrain.tools.plan.calibrate",
}
EPILOG = """parts, each with a help of its own (llmtrain plan PART -h):
  search      the best mesh for the run's model, batch and devices
  shapes      the best shape of a model at a budget of parameters
  errors      predictions beside published rows, each source left out in turn
  papers      predictions beside the papers' own numbers
  calibrate   measure this machine and write its description"""


def main(argv: Sequence[str]) -> int:
    """Run `plan`, or the part that the first word names; returns the exit code."""
    words = list(argv)
    if words and words[0] in PARTS:
        return importlib.import_module(PARTS[words[0]]).main(words[1:])
    options, overrides = parser().parse_known_args(words)
    cfg, hardware, devices = asked(options, overrides)
    case, rates = case_of(cfg, hardware, devices), fitted()
    found = replay(case, rates)
    from llmtrain.layout.mesh import MeshShape
    from llmtrain.tools.plan.report import lines

    mesh = MeshShape.from_config(cfg.parallel, world=devices, local=min(devices, hardware.devices_per_node)).describe()
    print("\n".join(lines(cfg.name, case, rates, found, mesh=mesh)))
    if options.timeline:
        from llmtrain.tools.plan.timeline import draw

        draw(found, Path(options.timeline))
        print(f"  wrote {options.timeline}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain plan`."""
    found = argparse.ArgumentParser(
        "llmtrain plan", description="does it fit, how long is a step, where does the time go", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_run(found)
    found.add_argument("--timeline", metavar="FILE", help="draw what every pipeline rank does when (.svg or .png; needs matplotlib)")
    return found


def add_run(found: argparse.ArgumentParser) -> None:
    """The words that say which run, on which machine."""
    found.add_argument("-c", "--config", required=True, metavar="FILE", help="the run; options of a run may follow, as for train")
    found.add_argument(
        "--hardware", required=True, metavar="NAME", help=f"{', '.join(keys())}; or a file that `plan calibrate` has written"
    )
    found.add_argument("--devices", type=int, help="devices in all; what the mesh asks for if not given")


def asked(options: argparse.Namespace, overrides: list[str]) -> tuple[RunConfig, Hardware, int]:
    """The run, the machine and how many devices. Raises UserError for words that are no options of a run."""
    cfg = parse_run_arguments(["-c", options.config, *overrides], verb="train")[0].run
    hardware = load(options.hardware)
    devices = options.devices or _devices(cfg)
    if devices < 1:
        raise UserError(f"--devices {devices}: at least 1")
    return cfg, hardware, devices


def _devices(cfg: RunConfig) -> int:
    parallel = cfg.parallel
    if parallel.dp_shard == -1:
        raise UserError("parallel.dp_shard is -1, all ranks that are left over: say with --devices how many there are")
    return parallel.pp * parallel.dp_replicate * parallel.dp_shard * parallel.cp * parallel.tp
