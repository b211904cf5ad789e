"""Makes a live model obey an assignment, reversibly. Torch only, no Lightning."""
