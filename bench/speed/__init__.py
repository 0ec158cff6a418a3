"""How fast refine is, beside other ways to do the same and beside the device's own limit."""
