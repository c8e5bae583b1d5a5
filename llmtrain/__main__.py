"""`python -m llmtrain` and `torchrun -m llmtrain`."""

from llmtrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
