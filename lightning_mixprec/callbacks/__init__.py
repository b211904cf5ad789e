"""Callbacks that watch what precision does to a run; one file each, and what they share."""
