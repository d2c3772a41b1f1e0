"""Training: the update and its averages, device and precision, optimizers, run folders, several processes."""
