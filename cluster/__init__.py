"""Ray, and nothing about reinforcement learning."""
