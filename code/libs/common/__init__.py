"""What everything may use: errors, files, checkpoints, the command line, pictures, seeds, memory."""
