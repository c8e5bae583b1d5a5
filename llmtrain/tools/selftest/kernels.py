"""Which implementations a self-test judges, and their lines."""

from llmtrain.tools.selftest.work import Job, Result


def jobs(machine: dict) -> list[Job]:
    """A job per implementation of every op that there are cases for."""
    return [
        Job(_name(op, name), "kernel", {"op": op, "implementation": name, "formats": machine["formats"]})
        for op, entry in machine["ops"].items()
        if entry["cases"]
        for name in entry["implementations"]
    ]


def lines(machine: dict, results: dict[str, Result]) -> list[dict]:
    """A line per implementation, format and case. An implementation whose process ended gets one line with its last words."""
    found: list[dict] = []
    for job in jobs(machine):
        result, told = results[job.name], job.arguments
        if result.error is None:
            found += result.values["lines"]
        else:
            blank = {"op": told["op"], "implementation": told["implementation"], "format": "", "case": "any"}
            found.append({**blank, "state": "failed", "why": result.error})
    for op, entry in machine["ops"].items():
        if not entry["cases"]:
            blank = {"op": op, "implementation": ", ".join(entry["implementations"]), "format": "", "case": ""}
            found.append({**blank, "state": "refused", "why": "selftest has no cases for this op"})
    return found


def _name(op: str, implementation: str) -> str:
    return f"kernels.{op}={implementation}"
