"""Journal in, evidence and windows out."""
