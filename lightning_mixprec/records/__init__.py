"""Records: what a run writes down and a checkpoint keeps, and how it is read back."""
