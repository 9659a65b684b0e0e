"""Training the bundled model from programs that a grammar writes. Nothing here runs in `etpo train`."""
