"""Evaluation: AP for base and novel classes, proposal recall, diagnostics."""
