"""The commands of the program `racecore`, one module each with `add_parser` and `run`."""
