"""RaceState, the additive sketch of keys and values, with its checks and snapshots."""

from racecore.state.contents import Snapshot
from racecore.state.race_state import RaceState

__all__ = ["RaceState", "Snapshot"]

# Pickles name a class by its module: this one stays, whichever module of the folder has the class.
RaceState.__module__ = Snapshot.__module__ = __name__
