"""Whole training steps: forward, backward and the optimizer's step as one function."""
