"""Timings of `adjoint` against its peers: run ``python -m benchmarks``; see README.md."""
