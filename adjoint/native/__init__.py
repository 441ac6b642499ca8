"""The user's function read into scalar expressions, and whole solves compiled from them."""
