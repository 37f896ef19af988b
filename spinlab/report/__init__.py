"""Reports: tables and figures, rebuilt from records and cached arrays alone."""
