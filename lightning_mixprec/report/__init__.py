"""The report: one HTML file that shows what precision did in a run."""
