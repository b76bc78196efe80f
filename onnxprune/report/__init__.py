"""What the user reads: the JSON report and the tables in the terminal."""
