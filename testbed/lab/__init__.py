"""Labs: isolated, started, found, entered and stopped. A lab is the process tree below one tini in private namespaces."""
