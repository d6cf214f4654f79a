"""Used by every room: errors for the user, reading and writing files, options, a run's folder."""
