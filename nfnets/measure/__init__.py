"""What programs take and how fast they are: memory, arithmetic, time, beside peers. Used by `launch` alone."""
