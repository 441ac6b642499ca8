"""The user's function read into scalar expressions: values, derivatives, rows, text."""
