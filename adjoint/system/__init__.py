"""The function of a user made flat: its state, what it captures, its Jacobians, and what passes between it and a solve."""
