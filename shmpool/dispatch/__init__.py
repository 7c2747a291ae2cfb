"""Dispatch: what to do next (a state machine), and the driver that does it."""
