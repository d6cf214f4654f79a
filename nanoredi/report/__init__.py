"""What runs have come to: tables, figures, failures, lengths."""
