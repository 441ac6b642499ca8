"""Of root finders on flat batches."""
