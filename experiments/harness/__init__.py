"""What all experiments share: options, result folders, progress, timing, errors."""
