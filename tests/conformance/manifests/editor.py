"""Stands in for the user's editor: ``kubectl edit`` runs it with the file's name."""

import sys
from pathlib import Path

path = Path(sys.argv[1])
text = path.read_text()
path.write_text(text.replace("port: 80\n", "port: 8080\n", 1).replace("targetPort: 8080", "targetPort: 80"))
