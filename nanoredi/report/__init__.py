"""Reports on runs and data: tables, figures, failures, lengths."""
