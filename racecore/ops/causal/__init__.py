"""Every query sees the keys up to and including its own token: one walk along the tokens, and its
gradient.
"""
