"""Workers: the child that receives, runs and sends; the parent that starts and watches it."""
