"""`llmtrain compare`: the same training step on two devices, kernels or engines, layer by layer; where their numbers part, and by how much.

`side` runs one step of a configuration under a `recorder`, which makes a `trace` of it. `measure` says how far a trace is from the same
step in float64 on the CPU, and how far honest rounding may be. `judge` lays two traces beside each other, `table` prints what it found,
`verb` is the command line.
"""
