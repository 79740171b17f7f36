"""Benchmarks of racecore for asv: `python asv_benchmarks/table.py` runs them and prints a table.

asv calls every function whose name begins with time_ (seconds), peakmem_ (bytes of the whole
process) or track_ (any number), for every combination of a class's `params`, each in a process of
its own. `setup` is not timed: it makes the inputs and calls what is measured once, so that kernels
are loaded and memory has been touched.
"""
