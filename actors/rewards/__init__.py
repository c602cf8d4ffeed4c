"""Rewards that read text: functions, checkers, code, services and judges, behind one face."""
