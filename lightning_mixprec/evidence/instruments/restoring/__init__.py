"""Everything that a replayed step may have changed: recorded before it, put back and checked after it."""
