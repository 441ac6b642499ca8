"""Of strategies of differentiation, and of the matrix of what meets what."""
