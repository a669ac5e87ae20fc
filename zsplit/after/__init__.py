"""What a finished run is good for: its model, uncut and in one process, tested, asked, and written for others."""
