"""The process behind `llmtrain.data.symbolic`: lines of JSON [given, expected] in, `true` or `false` out."""

import json
import sys

MEMORY = 2 * 2**30
"""Bytes of address space."""


def main() -> None:
    """Answer until stdin ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        # LaTeX alone: the package's other reader hands text to sympy's parse_expr, which evaluates it as Python.
        return parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        given, expected = json.loads(line)
        try:
            result = bool(verify(read(expected), read(given), timeout_seconds=None))
        except Exception:  # whatever a strange expression does to the library, it is not shown to be equal
            result = False
        print("true" if result else "false", flush=True)


if __name__ == "__main__":
    main()
