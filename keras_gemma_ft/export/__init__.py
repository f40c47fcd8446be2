"""A tuned model as files that other software reads."""
