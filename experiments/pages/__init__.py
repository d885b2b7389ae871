"""Pictures of the commands."""
