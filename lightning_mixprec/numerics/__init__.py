"""Number formats, rounding and statistics of numbers. Torch only; knows no layer, no policy, no trainer."""
