"""Steps compiled by torch.compile, pure or in place."""
