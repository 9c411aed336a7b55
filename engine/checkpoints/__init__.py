"""Published weight formats on one side, engine names on the other."""
