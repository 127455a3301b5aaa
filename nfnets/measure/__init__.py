"""Measures what programs take and how fast they are: memory, arithmetic, time, also against other libraries. For launch alone."""
