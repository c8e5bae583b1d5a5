"""What runs a step: engines behind one interface."""
