"""Load tests: what to send (trace), how it is sent (driver), what came back (record), and what it means (summary)."""
