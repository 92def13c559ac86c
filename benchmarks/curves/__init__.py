"""How time, compilation and memory grow."""
