"""RaceState, the additive sketch of keys and values, with its checks and snapshots."""

from racecore.state.race_state import RaceState

__all__ = ["RaceState"]
