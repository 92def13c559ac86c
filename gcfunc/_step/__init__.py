"""One step of any algorithm: state and trees on the outside, lists of tensors within."""
