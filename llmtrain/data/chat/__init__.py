"""Conversations: their schemas, the templates that render them, which of their tokens are learnt, how they are packed."""
