"""Training data as hyperparameters: how much each example counts, and what examples to learn from."""
