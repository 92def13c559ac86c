"""What gcfunc is measured against, and the commands that compare with it."""
