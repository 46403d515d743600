"""The paper's networks and their registry."""
