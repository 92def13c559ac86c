"""How things are timed and run, and on what."""
