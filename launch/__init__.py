"""The programs, run as `python -m launch.NAME`: they read flags and return an exit status; what they do lies in nfnets."""
