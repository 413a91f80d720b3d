"""The tables, a file each: its name is the table's. Add a file with a ``TABLE`` and there is one more."""
