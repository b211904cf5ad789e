"""What precision did in a run, as one HTML file."""
