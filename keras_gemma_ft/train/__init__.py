"""Training: the run, its optimizer, what watches it, and what it leaves behind."""
