"""Pictures of trained networks and of their training. Matplotlib is imported when something is drawn."""
