"""Of torchdiffeq's functions."""
