"""Customers that share one engine: is it shared fairly, and what does that cost."""
