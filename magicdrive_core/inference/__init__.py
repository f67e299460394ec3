"""Generation: items, sampling, writing, and the plan of its memory."""
