"""What README shows of the results."""
