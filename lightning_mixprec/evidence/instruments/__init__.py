"""Instruments that look into a model while one step runs, and leave no trace. Torch only, no Lightning."""
