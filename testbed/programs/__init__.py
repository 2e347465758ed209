"""What runs in pods: the image catalogue, our own programs, and the way into them (`builtins.run_builtin`)."""
