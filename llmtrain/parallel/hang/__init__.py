"""When a rank waits for ever: call sites mark where they are, a watcher in every rank notices, and one report says who is missing."""
