"""Object to payload and back: pickling, custom serialisers, and why something does not travel."""
