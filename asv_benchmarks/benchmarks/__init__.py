"""Benchmarks of racecore for asv: `python asv_benchmarks/table.py` runs them and prints a table.

asv calls every function whose name begins with time_ (seconds), peakmem_ (bytes of the whole
process) or track_ (any number), for every combination of a class's `params`, each in its own
process. `setup` is not timed: it makes the inputs and makes the measured call once, so that
kernels are loaded and memory is mapped.
"""
