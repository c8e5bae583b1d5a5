"""Who holds what, and when, as plain arithmetic."""
