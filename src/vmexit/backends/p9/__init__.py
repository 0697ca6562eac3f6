"""A folder of the host as a file server for guests: 9P2000.L."""
