"""Learning to learn: one leader from whom many tasks start."""
