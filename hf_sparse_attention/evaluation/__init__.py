"""Evaluation: how accurate, how sparse and how fast a model is under each setting."""
