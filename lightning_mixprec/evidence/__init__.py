"""Evidence of what precision did to a step: replays, comparisons with fp32, failed steps and why they failed."""
