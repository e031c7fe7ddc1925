"""One module per command of `ane-trainer`, named as it is typed."""
