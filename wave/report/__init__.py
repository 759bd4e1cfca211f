"""Reports for people: the HTML page, the table on the terminal, the Perfetto trace."""
