"""Attention over arrays that may be larger than memory: files, memory maps, or numbers made up on the way."""

from racecore.outofcore.driver import Report, run
from racecore.outofcore.synthetic import Synthetic

__all__ = ["Report", "Synthetic", "run"]
