"""The Lightning precision plugins: what they check, bring in force, count and keep in a checkpoint."""
