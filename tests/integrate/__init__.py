"""Of the loop over steps."""
