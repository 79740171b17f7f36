"""One token for every sequence of a batch: add its key to the state and answer its query, in one
pass over the state.
"""
