"""Programs: `python -m launch.NAME`. Flags in, exit status out."""
