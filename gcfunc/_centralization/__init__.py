"""Gradient centralization: the formula, which weights it applies to, and on what they lie."""
