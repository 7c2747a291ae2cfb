"""Memory: segments, mappings, and the numbers that say what lies where in them."""
