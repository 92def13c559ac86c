"""Steps on a GPU as a few Triton launches: one kernel for rows of any weight, made of a formula."""
