"""From a captured graph to a program that a chip accepts, printed and cached."""
