"""Arguments in, solutions out: the functions that users call, their checks, and what solutions are put together from."""
