"""Every query sees every key: sum the keys into a sketch, then read the sketch out; and both
gradients.
"""
