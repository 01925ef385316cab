"""What a run will need, before it has a machine: its memory, its traffic, its time."""
