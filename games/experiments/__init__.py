"""What all applications share: data, experiments in resumable parts, where these are kept, figures and the console."""
