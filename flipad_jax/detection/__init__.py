"""Passive attribution (FLIPAD paper): is this image ours?

features: what a detector looks at. deepsad: the paper's detector. calibration: scores to verdicts.
"""
