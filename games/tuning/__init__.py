"""Hyperparameters of a network, tuned by gradients of its validation loss."""
