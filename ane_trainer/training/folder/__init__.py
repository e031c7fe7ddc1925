"""A run's folder: what a training leaves there, read and kept up to date."""
