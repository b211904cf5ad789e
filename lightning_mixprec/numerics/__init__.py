"""What happens to numbers: formats, rounding, loss scaling. Torch only; knows no layer, no policy, no trainer."""
