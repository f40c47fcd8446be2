"""Talking to tuned models."""
