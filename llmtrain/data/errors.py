"""The error of this floor."""

from llmtrain.errors import UserError


class DataError(UserError, ValueError):
    """Input data that cannot be used: says what, where (file, line or byte), which value, and which option changes it."""
