"""Pictures and clips as files."""
