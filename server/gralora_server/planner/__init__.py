"""How many adapters, at what rate, fit an objective: a measured profile, and the scheduler run in simulated time."""
