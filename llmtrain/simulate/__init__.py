"""What a run costs before it runs: time, memory, the best mesh. Arithmetic on `config`, `layout` and `hardware`; no torch."""
