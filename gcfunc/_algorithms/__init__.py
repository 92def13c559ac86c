"""The algorithms, a file each, and what combines them."""
