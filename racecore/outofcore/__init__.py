"""Attention over arrays that may be larger than memory: files, memory maps, generated arrays."""

from racecore.outofcore.driver import run
from racecore.outofcore.estimate import Plan, plan
from racecore.outofcore.request import Report
from racecore.outofcore.synthetic import Synthetic

__all__ = ["Plan", "Report", "Synthetic", "plan", "run"]
