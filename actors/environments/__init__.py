"""Environments that a policy acts upon in turns, behind one face."""
