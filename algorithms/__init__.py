"""Pure functions over tensors: log-probs, KL, rewards, advantages, losses."""
