"""Files of a trained module in which every layer's format stands."""
