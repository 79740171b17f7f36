"""One token for every sequence of a batch: its key is added to the state, which is then read out
for its query, in one pass over the state.
"""
