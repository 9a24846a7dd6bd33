"""An hour of ordinary days: customers with tokens, at 70 % of what the server can do, while adapters change."""
