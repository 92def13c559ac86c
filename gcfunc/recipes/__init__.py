"""The command line: training on real data, by compiled functional steps or with hooks.

Needs the ``recipes`` extra. Nothing in the library itself imports this package.
"""
