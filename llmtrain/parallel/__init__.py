"""The mesh, and applying each of its axes to a model from outside."""
