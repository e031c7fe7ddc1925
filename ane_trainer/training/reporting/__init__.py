"""What people see of a training: the console, report.html, its analysis and charts, experiment trackers."""
