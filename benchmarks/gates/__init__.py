"""What a change must pass: counts, ratios within budgets, and how noisy they are."""
