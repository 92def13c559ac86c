"""What gcfunc costs, as ratios to named peers in one run: ``make bench`` and its sisters."""
