"""The error of a wrong configuration."""

from llmtrain.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; `problems` holds one message per thing wrong."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems))
