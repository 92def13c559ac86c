"""Tensors, alone, in lists, in trees, packed and sharded. Knows nothing of optimizers or GC."""
