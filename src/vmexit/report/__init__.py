"""A trace as one HTML page: reading it in one pass, adding up, showing."""
