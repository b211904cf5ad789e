"""Decisions about precision: the adaptive controller, and the phases of a schedule. Touches no tensor."""
