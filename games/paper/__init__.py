"""*Stochastic Hyperparameter Optimization through Hypernetworks* (arXiv 1802.09419), remade figure by figure."""
