"""Thousands of adapters: right answers while they change, no pauses for those who do not, and a start that is quick."""
