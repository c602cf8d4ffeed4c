"""What travels between the roles, in Arrow."""
