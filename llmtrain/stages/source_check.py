"""Whether conversations and plugins' data sources give every rank, and a resumed run, the same samples: what nothing else could notice."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.data import DataSource
from llmtrain.config.run import RunConfig
from llmtrain.data.errors import DataError
from llmtrain.parallel.mesh import Mesh

FILE = "samples.json"


def check_sources(cfg: RunConfig, open_dataset: Callable[[], Any], *, mesh: Mesh, folder: Path) -> list[str]:
    """Compare the first phase's first and last sample over ranks, and the first with what the run in `folder` began with.

    All ranks call it. Does nothing, and opens nothing, where all sources are tokenised files. Returns what the others have to say.

    Raises:
        DataError: on every rank, if they differ.
    """
    kinds = {source.kind for source in cfg.data.train if not isinstance(source, DataSource)}
    if not kinds:
        return []
    name = "/".join(sorted(kinds))
    rule = "a sample must follow from the source's options, the seed and the index alone (docs/plugins.md)"
    dataset = open_dataset()
    digests = mesh.gather(digest(dataset, 0, len(dataset) - 1))
    if len(set(digests)) > 1:
        other = next(rank for rank, one in enumerate(digests) if one != digests[0])
        raise DataError(f"data.train: sources of kind {name} give other samples on rank {other} than on rank 0; {rule}")
    first = digest(dataset, 0)  # not the last: a run may be made longer
    if mesh.gather(_began_with(cfg, folder, first) if mesh.rank == 0 else None)[0] != first:
        raise DataError(
            f"data.train: sources of kind {name} give another first sample than when this run began ({folder / FILE}); {rule}. "
            "If the data was meant to change, set checkpoint.resume: none or choose another name"
        )
    return dataset.notes


def digest(dataset: Any, *indices: int) -> str:
    """A hash of samples."""
    found = hashlib.sha256()
    for index in indices:
        batch = dataset.batch(index, 1)
        found.update(batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes())
    return found.hexdigest()


def _began_with(cfg: RunConfig, folder: Path, now: str) -> str:
    """The hash that the run began with; noted now if it has not begun."""
    file, begun = folder / FILE, any((folder / "checkpoints").glob("step-*"))
    if file.exists() and begun and cfg.checkpoint.resume != "none":
        return json.loads(file.read_text())["first"]
    file.write_text(json.dumps({"first": now}) + "\n")
    return now
