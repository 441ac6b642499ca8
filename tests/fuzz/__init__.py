"""A fuzzer: random solves whose values and derivatives are held against an independent reference. See docs/testing.md.

``python -m tests.fuzz --cases 1000 --seed 0 --jobs 2``. Every case is drawn from its seed alone (`draw`), written as a program that could
stand by itself (`program`), run, and judged (`judge`) against SciPy's DOP853 on the pure form of the same equations (`reference`).
"""
