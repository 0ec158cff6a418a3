"""The quality bench: what pictures are worth, measured."""
