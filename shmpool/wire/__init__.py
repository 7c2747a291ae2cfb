"""The wire: messages as dataclasses, and the channel that carries them and descriptors."""
