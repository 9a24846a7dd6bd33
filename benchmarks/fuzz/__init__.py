"""Mutated requests against a real server, and mutated configuration files: what must not hurt, and whether it did."""
