"""Of functions, what they capture, their Jacobians."""
