"""`llmtrain selftest --device npu|cuda|cpu --ranks N`: parity, kernel errors, a short benchmark and doctor, in one file to send back."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.tools.launch import is_launched
from llmtrain.tools.selftest import bench, kernels, parity, work
from llmtrain.tools.selftest.doctor import doctor
from llmtrain.tools.selftest.redact import redacted
from llmtrain.tools.selftest.report import markdown, verdicts
from llmtrain.tools.selftest.work import Job, Result

PARTS = ("doctor", "kernels", "parity", "bench")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts, write the file. Returns 0, or 1 when something is wrong."""
    options = parser().parse_args(argv)
    if is_launched():
        raise UserError("selftest starts its own ranks on one machine: run it without torchrun or srun")
    parts = _parts(options.only)
    device = options.device if options.device != "auto" else _auto()
    out = Path(options.out or f"selftest-{device}-{datetime.now():%Y%m%d-%H%M}.md")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` that ends the processes
    with tempfile.TemporaryDirectory(prefix="llmtrain-selftest-") as folder:
        found = Session(device, options.ranks, parts, options.plugin, Path(folder)).run()
    if not options.identify:
        found = redacted(found)
    out.write_text(markdown(found))
    for line in verdicts(found):
        print(line)
    print(f"{out} written: one file to send back" + ("" if options.identify else ", without names of hosts, users and addresses"))
    return 1 if found["failed"] else 0


class Session:
    """One self-test: what is asked for, and what has been found."""

    def __init__(self, device: str, ranks: int, parts: Sequence[str], plugins: list[str], folder: Path):
        self.device, self.ranks, self.parts, self.plugins, self.folder = device, ranks, parts, plugins, folder
        self.started, self.spent, self.left = time.monotonic(), 0.0, 0.0
        self.found: dict = {"format": 1, "device": device, "ranks": ranks, "parts": list(parts)}

    def run(self) -> dict:
        """All parts; what was found, as JSON can hold it."""
        self.found["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.found["versions"] = versions()
        if "doctor" in self.parts:
            _say("doctor")
            self.found["doctor"] = doctor(self.device, self.ranks, self.folder)
        machine = self._machine()
        alone, together, reference = self._jobs(machine)
        self.left = len(reference) + len(alone) + self.ranks * len(together)
        results = {}
        if self.device == "cpu":
            alone, reference = [*reference, *alone], []
        for jobs, ranks, device in ((reference, 1, "cpu"), (alone, 1, self.device), (together, self.ranks, self.device)):
            results |= self._world(jobs, ranks=ranks, device=device)
        self._judge(machine, results)
        self.found["seconds"] = round(time.monotonic() - self.started)
        return self.found

    def _machine(self) -> dict:
        """Ops, formats and devices, asked of a process of its own: a broken back end must not end this one."""
        _say("looking at the device")
        result = self._world([Job("device", "list_kernels")], ranks=1, device=self.device, quiet=True)["device"]
        if result.error is not None:
            raise UserError(f"device {self.device} cannot be used: {result.error} (`llmtrain doctor --device {self.device}` says more)")
        work.check_ranks(self.ranks, self.device, result.values["count"])
        self.found["machine"] = {name: result.values[name] for name in ("device", "name", "formats", "count")}
        return result.values

    def _jobs(self, machine: dict) -> tuple[list[Job], list[Job], list[Job]]:
        """What one rank of the device does, what all of them do, and what one process of the CPU does."""
        alone, together, reference = [], [], []
        self.rows = []
        self.precisions = tuple(name for name in ("fp64", "fp32") if name in machine["formats"])
        if "kernels" in self.parts:
            alone += kernels.jobs(machine)
        if "parity" in self.parts:
            self.rows = [(row, parity.refusal(row, ranks=self.ranks, device=self.device)) for row in parity.rows(self.ranks, self.device)]
            if self.rows:
                reference = parity.references(self.ranks, self.precisions)
            runs = [row for row, refusal in self.rows if refusal is None]
            for row in runs:
                (together if row.parallel else alone).extend(parity.jobs([row], ranks=self.ranks, precisions=self.precisions))
        if "bench" in self.parts:
            alone += bench.alone(self.device, machine["formats"])
            together += bench.together(self.device, self.ranks)
        return alone, together, reference

    def _world(self, jobs: list[Job], *, ranks: int, device: str, quiet: bool = False) -> dict[str, Result]:
        def done(job: Job, result: Result) -> None:
            self.spent += ranks
            if not quiet:
                self._progress(job, result)

        return work.run(jobs, ranks=ranks, device=device, folder=self.folder, plugins=self.plugins, done=done) if jobs else {}

    def _progress(self, job: Job, result: Result) -> None:
        passed, share = time.monotonic() - self.started, min(1.0, self.spent / max(1, self.left))
        failed = f"  FAILED: {result.error}" if result.error else ""
        _say(f"{100 * share:3.0f}%  about {passed / share - passed:3.0f} s to go  {job.name}{failed}")

    def _judge(self, machine: dict, results: dict[str, Result]) -> None:
        if "kernels" in self.parts:
            self.found["kernels"] = kernels.lines(machine, results)
        if "parity" in self.parts:
            self.found["parity"] = [
                {"name": row.name, "state": "refused", "why": refusal} if refusal else parity.verdict(row, precision, results)
                for row, refusal in self.rows
                for precision in (self.precisions if refusal is None else ("",))
            ]
        if "bench" in self.parts:
            names = [job.name for job in (*bench.alone(self.device, machine["formats"]), *bench.together(self.device, self.ranks))]
            self.found["bench"] = [{"name": name, **(results[name].values or {"error": results[name].error})} for name in names]
        self.found["failed"] = failures(self.found)


def failures(found: dict) -> list[str]:
    """What is wrong, a line each; doctor's lines included."""
    lines = [
        f"kernels.{x['op']}={x['implementation']} {x['format']}, {x['case']}: {x.get('why') or _worst(x)}"
        for x in _failed(found, "kernels")
    ]
    lines += [f"parity of {x['name']} in {x['precision']}: {x.get('error') or _parity(x)}" for x in _failed(found, "parity")]
    lines += [f"bench {x['name']}: {x['error']}" for x in found.get("bench", []) if "error" in x]
    lines += [f"bench {x['name']}: its sum is wrong" for x in found.get("bench", []) if x.get("right") is False]
    return lines + [f"doctor: {text}" for text in found.get("doctor", {}).get("wrong", [])]


def _failed(found: dict, part: str) -> list[dict]:
    return [line for line in found.get(part, []) if line["state"] == "failed"]


def _worst(line: dict) -> str:
    name, part = max(line["parts"].items(), key=lambda item: item[1]["error"] / item[1]["bound"])
    return f"{name} differs from float64 by {part['error']:.1e} of its norm, allowed {part['bound']:.1e}"


def _parity(line: dict) -> str:
    return ", ".join(f"{part} {line[part]:.1e} (allowed {line[part + '_bound']:.1e})" for part in ("loss", "gradient"))


def versions() -> dict[str, str]:
    """Python, llmtrain and the packages that decide the numbers."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("llmtrain", "torch", "torch-npu", "triton", "triton-ascend", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _parts(only: str | None) -> list[str]:
    wanted = only.split(",") if only else list(PARTS)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise UserError(f"--only {only}: {unknown[0]!r} is no part; allowed: {', '.join(PARTS)}, several with commas")
    return wanted


def _auto() -> str:
    from llmtrain.device import select

    return select("auto").kind


def _say(text: str) -> None:
    print(f"selftest: {text}", flush=True)


def parser() -> argparse.ArgumentParser:
    """The words of `llmtrain selftest`."""
    p = argparse.ArgumentParser(
        prog="llmtrain selftest",
        description="Compare this machine's numbers with one process on the CPU in float64, time it, and write one file to send back.",
    )
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu"), help="what is tested (what is here)")
    p.add_argument("--ranks", type=int, default=2, help="ranks of the meshes that are tested, a device each (2)")
    p.add_argument("--out", help="file to write (selftest-DEVICE-TIME.md)")
    p.add_argument("--only", help=f"parts, with commas between: {','.join(PARTS)} (all)")
    p.add_argument("--plugin", action="append", default=[], help="module to import first; its ops are tested too")
    p.add_argument("--identify", action="store_true", help="leave names of hosts and users, and addresses, in the file")
    return p
