"""The state of the tree that something was measured on."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit_name(*more: str) -> str:
    """The commit that is run, and whether the tree differs from it in what is measured, or in folders named in `more`."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "llmtrain", "kernels", "tests/support", *more)
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
