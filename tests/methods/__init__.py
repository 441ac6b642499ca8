"""Of families of methods."""
