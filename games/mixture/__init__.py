"""How much of each source a language model is trained on, learned in the training run itself."""
