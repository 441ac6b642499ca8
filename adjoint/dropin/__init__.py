"""What stands behind ``odeint`` and its relatives: torchdiffeq's arguments in, our own rooms underneath."""
