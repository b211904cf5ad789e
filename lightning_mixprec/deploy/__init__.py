"""Doors for a model that is planned, compared and exported, beside its training."""
