"""Of linear solvers."""
