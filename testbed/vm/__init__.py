"""The nested kernel: User-Mode Linux with the host's files, for what this machine's own kernel lacks."""
