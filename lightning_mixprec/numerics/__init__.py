"""What a format does to numbers: formats, rounding, statistics. Torch only; knows no layer, no policy, no trainer."""
