"""Of what users call."""
