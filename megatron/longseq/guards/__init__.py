"""Guards of a training run: non-finite gradients, loss spikes, stalls, and requests to stop."""
