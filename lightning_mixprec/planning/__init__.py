"""Decisions about precision: the controller, remedies, and phases of a schedule. Touches no tensor."""
