"""The command line: training on real data through the compiled functional step.

Needs the ``recipes`` extra. Nothing in the library itself imports this package.
"""
