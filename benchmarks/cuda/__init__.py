"""What Inductor generates for a CUDA device, counted where there is none."""
