"""shmpool in the place of what other libraries, and the standard library, offer."""
