"""What makes the optimizers known to other libraries; nothing in gcfunc imports it."""
