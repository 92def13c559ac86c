"""All that a GPU is asked for at once, on the day there is one: ``make gpu``."""
