"""The command line: click commands that parse, call the library, print, and turn errors into exit codes."""
