"""What the shell sees: one module per command, each with `add_parser` and `run`; `racecore.cli`
puts them together.
"""
