"""What every room uses: errors for people, files in and out, options, the folder of a run."""
