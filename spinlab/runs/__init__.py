"""The runs on this disk: listed, shown, compared, cleared away. Nothing here loads torch."""
