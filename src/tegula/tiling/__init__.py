"""Windows and canvases: integers and numpy, no torch."""
